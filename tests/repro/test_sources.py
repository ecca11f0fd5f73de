"""The files that go beside a repro.py: the target's own and what they import from its folder, and no others."""

from __future__ import annotations

import pytest

from gradctl.core.target_files import parse_target
from gradctl.repro.sources import copy_sources


def write(folder, **files):
    """Write files by name, ``__`` standing for a slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/', 1)}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def copied(tmp_path, target):
    """Return the import name of a target, and the copied files by path."""
    folder = tmp_path / "source"
    name = copy_sources(parse_target(str(target)), folder)
    return name, {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_what_a_file_imports_from_its_folder_comes_with_it(tmp_path):
    write(
        tmp_path,
        net="import torch\nimport layers\n",
        layers="def f():\n    from blocks import B\n",
        blocks="",
        other="",
    )
    assert copied(tmp_path, tmp_path / "net.py") == ("net", {"net.py", "layers.py", "blocks.py"})


@pytest.mark.parametrize("text", ["from .ops import F", "from . import ops", "from pkg.ops import F", "import pkg.ops"])
def test_a_package_comes_as_one(tmp_path, text):
    write(tmp_path, pkg__net=text, pkg__ops="", pkg__unused="")
    (tmp_path / "pkg" / "__init__.py").write_text("", encoding="utf-8")
    assert copied(tmp_path, tmp_path / "pkg" / "net.py") == ("pkg.net", {"pkg/__init__.py", "pkg/net.py", "pkg/ops.py"})


def test_a_file_that_would_hide_pythons_own_gets_another_name(tmp_path):
    write(tmp_path, random="")
    assert copied(tmp_path, tmp_path / "random.py") == ("source_random", {"source_random.py"})


def test_an_installed_package_is_imported_by_its_name(tmp_path):
    assert copied(tmp_path, "torch.nn:Linear") == ("torch.nn", set())
