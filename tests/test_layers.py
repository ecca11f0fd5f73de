"""The layers, low to high: each imports only from those before it, inside functions too. No folder is too long."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import gradctl
from tests.conftest import FAST

PACKAGE = Path(gradctl.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# The folders and files of the package, low to high. ARCHITECTURE.md explains each.
LAYERS = [
    *("core", "rules", "report", "isolation", "environments", "subject", "numerics", "onnxio", "tracing", "joint"),
    *("forms", "gradients", "comparison", "graphdiff", "inspection", "diagnosis", "training"),
    *("snapshots", "passes", "commands"),
    *("suite", "repro", "check_report", "api", "__init__", "pytest_plugin", "cli", "__main__"),
]
# These know of the layer below that is named, and of no other: a report can be read where torch is not installed.
ONLY_ON = {
    "rules": {"core"},
    "report": {"core", "rules"},
    "isolation": {"core"},
    "environments": {"core", "isolation"},
    "__init__": {"core", "check_report", "api"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = {"core", "rules", "report", "isolation", "environments"}

MOST_FILES = 16
# Files of one name mean one thing: the command, its options and the form of its name; the data and their text.
SAME_MEANING = {"bench", "check", "compare", "doctor", "export", "gradcheck", "optimize", "trace"} | {
    "inspection",
    "optimization",
    "structure",
    "table",
    "losses",
}


def imported_modules(tree):
    """Return every module that the code imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import modules by their full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(file):
    return file.partition("/")[0].removesuffix(".py")


def offences(file, source):
    """Return the imports of a file that its layer may not make."""
    layer = layer_of(file)
    below = ONLY_ON.get(layer, set(LAYERS[: LAYERS.index(layer)]))
    if layer not in ONLY_ON and LAYERS.index(layer) < LAYERS.index("suite"):
        below = below - {"rules", "report"}  # what decides does not print
    for name in imported_modules(ast.parse(source)):
        package, _, rest = name.partition(".")
        if package == "gradctl" and rest.partition(".")[0] not in below | {layer, "__version__"}:
            yield name
        if package in ("torch", "onnx", "onnxruntime", "onnxscript") and layer in WITHOUT_TORCH:
            yield name


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_layer_may(file):
    assert list(offences(file, (PACKAGE / file).read_text(encoding="utf-8"))) == []


def test_every_folder_is_a_layer():
    assert {layer_of(file) for file in FILES} == set(LAYERS)


def test_the_fast_tests_have_some_of_every_folder():
    folders = {file.partition("/")[0] for file in FILES if "/" in file}
    assert folders - {each.partition("/")[0] for each in FAST} == set()
    root = Path(__file__).parent
    missing = [each for each in FAST if not any(root.glob(f"{each.partition('::')[0]}*"))]
    assert missing == []


def test_no_folder_has_more_files_than_a_reader_can_hold():
    count = Counter(Path(file).parent.as_posix() for file in FILES if not file.endswith("__init__.py"))
    del count["joint/decompositions"]
    assert {folder: files for folder, files in count.items() if files > MOST_FILES} == {}


def test_the_package_stays_within_the_line_budget_of_contributing_md():
    lines = Counter()
    for file in FILES:
        lines[layer_of(file)] += len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
    for layer in LAYERS:
        print(f"{layer:<14}{lines[layer]:>7}")
    print(f"{'all':<14}{lines.total():>7}")
    (budget,) = re.findall(r"at most ([\d ]+\d) lines", CONTRIBUTING.read_text(encoding="utf-8"))
    assert lines.total() <= int(budget.replace(" ", ""))


def test_files_of_one_name_mean_one_thing():
    count = Counter(Path(file).stem for file in FILES)
    assert {name for name, files in count.items() if files > 1} - {"__init__"} - SAME_MEANING == set()


def test_public_classes_of_one_name_mean_one_thing():
    count = Counter(
        node.name
        for file in FILES
        for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, classes in count.items() if classes > 1} == set()


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("core/names.py", "from gradctl.report.machine.json import load", ["gradctl.report.machine.json.load"]),
        ("report/formats.py", "def f():\n    import torch.nn", ["torch.nn"]),
        ("numerics/ladder.py", "def f():\n    from gradctl.commands import doctor", ["gradctl.commands.doctor"]),
        ("commands/trace.py", "from gradctl.report import formats", ["gradctl.report.formats"]),
        ("cli/main.py", "import gradctl", ["gradctl"]),
        ("cli/main.py", "from gradctl import __version__\nfrom gradctl.commands import doctor", []),
    ],
)
def test_the_rule_itself_finds_what_it_is_for(file, source, found):
    assert list(offences(file, source)) == found
