"""Private names of torch stand in one file, and one that is gone is one clear error."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import gradctl
from gradctl.core.errors import ResourceError
from gradctl.subject import torch_private

PACKAGE = Path(gradctl.__file__).parent
# A base class, which a type checker must see; and two modules that are probed because they may be absent.
ELSEWHERE = {
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch._dynamo.is_dynamo_supported",
    "torch.jit._recursive",
}


def private_names(source):
    """Return the private names of torch that Python code imports or reads, by their full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            if re.match(r"torch\.(?!ops\.)[\w.]*(?<=\.)_[a-zA-Z]", name) and "(" not in name:
                yield name


@pytest.mark.parametrize("name", torch_private._NAMES)
def test_this_version_of_torch_has_the_name(name):
    assert getattr(torch_private, name) is not None


def test_a_name_that_is_gone_is_one_error_that_names_the_version(monkeypatch):
    monkeypatch.setitem(torch_private._NAMES, "gone", "torch:_C._functorch.gone")
    said = f"torch {torch.__version__} has no torch._C._functorch.gone, which gradctl needs. Install a version"
    with pytest.raises(ResourceError, match=f"GC804 {re.escape(said)}"):
        torch_private.gone  # looking it up is the test


def test_a_module_that_is_gone_is_the_same_error(monkeypatch):
    monkeypatch.setitem(torch_private._NAMES, "gone", "torch._gone:name")
    with pytest.raises(ResourceError, match=r"has no torch\._gone\.name"):
        torch_private.gone


def test_no_other_file_uses_a_private_name_of_torch():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in private_names(path.read_text(encoding="utf-8"))
        if not any(f"{name}.".startswith(f"{each}.") or f"{each}.".startswith(f"{name}.") for each in ELSEWHERE)
    }
    assert found == set()


def test_a_patch_is_undone_for_an_inherited_name_too():
    class Base:
        name = 1

    class Derived(Base):
        pass

    with torch_private.patched(Derived, "name", 2):
        assert Derived.name == 2
    assert "name" not in vars(Derived)
