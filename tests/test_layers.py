"""Each layer imports only what lies to its right, in functions too: cli, suite, checks, passes, forms and so on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradctl

PACKAGE = Path(gradctl.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Folder → the other folders it may import from. ``__main__`` stands for the files at the top.
MAY_IMPORT = {
    "core": set(),
    "rules": {"core"},
    "report": {"core"},
    "subject": {"core"},
    "numerics": {"subject", "core"},
    "forms": {"joint", "numerics", "subject", "core"},
    "joint": {"numerics", "subject", "core"},
    "passes": {"forms", "numerics", "subject", "core"},
    "checks": {"forms", "joint", "passes", "numerics", "subject", "core"},
    "suite": {"checks", "forms", "joint", "passes", "numerics", "subject", "core", "rules"},
    "cli": {"suite", "checks", "forms", "joint", "passes", "numerics", "subject", "core", "report", "rules"},
    "api": {"checks", "subject", "core", "report", "rules"},
    "pytest_plugin": {"api", "suite", "checks", "report", "core"},
    "__init__": {"api", "core"},
    "__main__": {"cli"},
}
# Third-party packages that a layer must not know, so that the report can be read where torch is not.
WITHOUT_TORCH = {"core", "report", "rules"}


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
    ours = {layer, "__version__", *MAY_IMPORT[layer]}
    for name in imported_modules(ast.parse(source)):
        package, _, rest = name.partition(".")
        if package == "gradctl" and rest.partition(".")[0] not in ours:
            yield name
        if package in ("torch", "onnx", "onnxruntime", "onnxscript") and layer in WITHOUT_TORCH:
            yield name


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_layer_may(file):
    assert list(offences(file, (PACKAGE / file).read_text(encoding="utf-8"))) == []


def test_every_folder_is_a_layer():
    assert {layer_of(file) for file in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("core/names.py", "from gradctl.report.json import load", ["gradctl.report.json.load"]),
        ("report/json.py", "def f():\n    import torch.nn", ["torch.nn"]),
        ("numerics/ladder.py", "def f():\n    from gradctl.checks import doctor", ["gradctl.checks.doctor"]),
        ("cli/main.py", "import gradctl", ["gradctl"]),
        ("cli/main.py", "from gradctl import __version__\nfrom gradctl.checks import doctor", []),
    ],
)
def test_the_rule_itself_finds_what_it_is_for(file, source, found):
    assert list(offences(file, source)) == found
