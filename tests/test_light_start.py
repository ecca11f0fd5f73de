"""What does not compute does not wait: help, version and rule pages load neither torch nor what they do not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gradctl.cli.main import COMMANDS

# Of ours, what each command line loads. To add to this list is a decision: it is what every ``--help`` waits for.
OF_HELP = {"gradctl", "gradctl.cli", "gradctl.cli.main", "gradctl.core", "gradctl.core.errors"}
OF_EXPLAIN = OF_HELP | {"gradctl.cli.commands.explain", "gradctl.rules", "gradctl.rules.catalogue"}
OF_OPTIONS = OF_HELP | {"gradctl.cli.reporting", "gradctl.core.names", "gradctl.core.target_options"}
OF_TARGETS = OF_OPTIONS | {"gradctl.cli.options", "gradctl.cli.users_code"}
OF_REPRO = OF_TARGETS | {"gradctl.cli.repro"}
OF_WRITTEN = OF_TARGETS | {"gradctl.cli.written"}
LOADED = {
    ("--help",): OF_HELP,
    ("--version",): OF_HELP,
    ("explain",): OF_EXPLAIN,
    ("explain", "GC401"): OF_EXPLAIN,
    ("explain", "--help"): OF_HELP | {"gradctl.cli.commands.explain"},
    ("check", "--help"): OF_HELP | {"gradctl.cli.commands.check", "gradctl.cli.reporting", "gradctl.core.names"},
    ("report", "--help"): OF_HELP | {"gradctl.cli.commands.report", "gradctl.cli.reporting", "gradctl.core.names"},
    ("doctor", "--help"): OF_HELP | {"gradctl.cli.commands.doctor"},
    ("gradcheck", "--help"): OF_REPRO | {"gradctl.cli.commands.gradcheck"},
    ("compare", "--help"): OF_REPRO | {"gradctl.cli.commands.compare"},
    ("trace", "--help"): OF_WRITTEN | {"gradctl.cli.commands.trace"},
    ("export", "--help"): OF_WRITTEN | {"gradctl.cli.commands.export"},
    ("optimize", "--help"): OF_TARGETS | {"gradctl.cli.commands.optimize"},
    ("inspect", "--help"): OF_TARGETS | {"gradctl.cli.commands.inspect"},
}
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "rich", "msgspec")

SCRIPT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
sys.argv = ["gradctl", *{arguments!r}]
from gradctl.cli.main import main
main()
"""


def modules(arguments):
    """Return the names of the modules that a fresh interpreter has after this command line."""
    script = SCRIPT.format(arguments=list(arguments))
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stderr))


@pytest.mark.parametrize("arguments", LOADED, ids=" ".join)
def test_only_what_is_on_the_list_is_loaded(arguments):
    loaded = modules(arguments)
    assert sorted(loaded.intersection(HEAVY)) == []
    ours = {name for name in loaded if name.partition(".")[0] == "gradctl"}
    assert ours - {"gradctl.cli.commands"} == LOADED[arguments]


def test_every_command_has_its_help_on_the_list():
    assert {arguments[0] for arguments in LOADED if arguments[-1] == "--help"} == {"--help", *COMMANDS}
