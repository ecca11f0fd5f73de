"""What does not compute does not wait: help, version and rule pages load neither torch nor what they do not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gradctl.cli.main import COMMANDS

# Of ours, what each command line loads. To add to this list is a decision: it is what every ``--help`` waits for.
OF_HELP = {"gradctl", "gradctl.cli", "gradctl.cli.help", "gradctl.cli.main"}
OF_HELP |= {"gradctl.core", "gradctl.core.errors", "gradctl.core.names"}
OF_EXPLAIN = OF_HELP | {"gradctl.cli.commands.explain", "gradctl.rules", "gradctl.rules.catalogue"}
OF_CHECK = OF_HELP | {"gradctl.cli.commands.check", "gradctl.cli.dask_options", "gradctl.cli.reporting"}
OF_OPTIONS = OF_HELP | {"gradctl.cli.reporting", "gradctl.core.names", "gradctl.core.target_options"}
OF_TARGETS = OF_OPTIONS | {"gradctl.cli.options", "gradctl.cli.users_code", "gradctl.core.target_files"}
OF_TARGETS |= {"gradctl.core.library_targets"}
OF_REPRO = OF_TARGETS | {"gradctl.cli.repro"}
OF_WRITTEN = OF_TARGETS | {"gradctl.cli.written"}
LOADED = {
    ("--help",): OF_HELP,
    ("--version",): OF_HELP,
    ("explain",): OF_EXPLAIN,
    ("explain", "GC401"): OF_EXPLAIN,
    ("explain", "--help"): OF_HELP | {"gradctl.cli.commands.explain"},
    ("check", "--help"): OF_CHECK | {"gradctl.core.names"},
    ("report", "--help"): OF_HELP | {"gradctl.cli.commands.report", "gradctl.cli.reporting", "gradctl.core.names"},
    ("doctor", "--help"): OF_HELP | {"gradctl.cli.commands.doctor"},
    ("init", "--help"): OF_CHECK | {"gradctl.cli.commands.init"},
    ("gradcheck", "--help"): OF_REPRO | {"gradctl.cli.commands.gradcheck"},
    ("compare", "--help"): OF_REPRO | {"gradctl.cli.commands.compare"},
    ("bench", "--help"): OF_TARGETS | {"gradctl.cli.commands.bench"},
    ("snapshot", "--help"): OF_TARGETS | {"gradctl.cli.commands.snapshot"},
    ("verify", "--help"): OF_TARGETS | {"gradctl.cli.commands.verify"},
    ("trace", "--help"): OF_WRITTEN | {"gradctl.cli.commands.trace"},
    ("export", "--help"): OF_WRITTEN | {"gradctl.cli.commands.export"},
    ("optimize", "--help"): OF_TARGETS | {"gradctl.cli.commands.optimize"},
    ("inspect", "--help"): OF_TARGETS | {"gradctl.cli.commands.inspect"},
}
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "rich", "msgspec")

# What a shell asks for at each press of the tab key.
COMPLETED = {
    "gradctl ": ["gradcheck", "compare", "report"],
    "gradctl gradcheck --f": ["--form", "--fail-on", "--format"],
    "gradctl gradcheck --form ex": ["export", "export-joint"],
    "gradctl explain GC40": ["GC401", "GC402"],
    "gradctl gradcheck sample_m": ["sample_m"],  # of type "file", which the shell itself completes
}

SCRIPT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
sys.argv = ["gradctl", *{arguments!r}]
from gradctl.cli.main import main
main()
"""


def run(arguments, folder=None):
    """Return exit code, message and the names of all modules of a fresh interpreter after this command line."""
    script = SCRIPT.format(arguments=list(arguments))
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder)
    *message, names = finished.stderr.splitlines()
    return finished.returncode, "\n".join(message), set(json.loads(names))


@pytest.mark.parametrize("arguments", LOADED, ids=" ".join)
def test_only_what_is_on_the_list_is_loaded(arguments):
    exit_code, message, loaded = run(arguments)
    assert (exit_code, message) == (0, "")
    assert sorted(loaded.intersection(HEAVY)) == []
    ours = {name for name in loaded if name.partition(".")[0] == "gradctl"}
    assert ours - {"gradctl.cli.commands"} == LOADED[arguments]


def test_every_command_has_its_help_on_the_list():
    assert {arguments[0] for arguments in LOADED if arguments[-1] == "--help"} == {"--help", *COMMANDS}


MISSING_TARGET = "GC101 there is no file 'nett.py' (did you mean 'net.py'?). Paths start at '{folder}'."

MISSING_TYPE = (
    "GC125 transformers has no model type 'lama' (did you mean 'llama'?). A checkpoint is named by its folder: "
    "hf:./FOLDER."
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gradcheck", "nett.py"), MISSING_TARGET),
        (("gradcheck", "net.py", "--weights", "none.pt"), "GC122 there is no file 'none.pt'."),
        (("gradcheck", "net.py", "--inputs", "none.npz"), "GC122 there is no file 'none.npz'."),
        (("compare", "nett.py"), MISSING_TARGET),
        (("compare", "net.py", "none.pt2"), "GC142 there is no file 'none.pt2'."),
        (("compare", "none.onnx", "net.onnx"), "GC142 there is no file 'none.onnx' (did you mean 'net.onnx'?)."),
        (("trace", "nett.py", "-o", "net.pt"), MISSING_TARGET),
        (("export", "nett.py", "-o", "net.onnx"), MISSING_TARGET),
        (("optimize", "nett.py", "-o", "out.onnx"), MISSING_TARGET),
        (("optimize", "none.onnx", "-o", "out.onnx"), "GC142 there is no file 'none.onnx' (did you mean 'net.onnx'?)."),
        (("inspect", "nett.py"), MISSING_TARGET),
        (("inspect", "hf:lama"), MISSING_TYPE),
        (("inspect", "none.onnx"), "GC142 there is no file 'none.onnx' (did you mean 'net.onnx'?)."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_missing_file_is_reported_before_torch_is_imported(tmp_path, arguments, message):
    for name in ("net.py", "net.onnx"):
        (tmp_path / name).write_text("not read")
    exit_code, said, loaded = run(arguments, tmp_path)
    assert (exit_code, said) == (2, message.format(folder=tmp_path))
    assert sorted(loaded.intersection(HEAVY)) in ([], ["msgspec"])


def test_a_unit_of_a_missing_file_is_reported_before_torch_is_imported(tmp_path):
    script = """
import sys
from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import UnitRequest
from gradctl.suite.worker import run_unit
try:
    run_unit(UnitRequest(checking=TargetOptions("none.py")))
except TargetError as error:
    print(error.code, "torch" in sys.modules)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (finished.stdout, finished.stderr) == ("GC101 False\n", "")


@pytest.mark.parametrize("line", COMPLETED)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_right_and_loads_nothing_heavy(shell, line):
    words = line.split(" ")
    last = str(len(words) - 1) if shell != "fish" else words[-1]
    environment = {"_GRADCTL_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": last}
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(arguments=[])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answers = finished.stdout.replace(",", "\n").replace("\t", "\n").splitlines()
    assert set(COMPLETED[line]) <= set(answers)
    assert set(json.loads(finished.stderr)).isdisjoint(HEAVY)


def test_gradcheck_does_not_load_dynamo():
    """It imports triton, which reads once whether its interpreter is on: before the target is known."""
    code = "import sys; import gradctl.commands.compare_candidate; print('torch._dynamo' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
