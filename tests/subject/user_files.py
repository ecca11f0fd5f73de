"""Files such as a user has, written into a folder of the test's own, from which python then forgets all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

Write = Callable[[str, str], str]


@contextlib.contextmanager
def folder_of_the_user(path: Path) -> Iterator[Write]:
    """Work in ``path``, and give a function that writes a file there and returns its name, which is a target."""

    def write(name: str, text: str) -> str:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).lstrip("\n"))
        return name

    modules, import_path, before = set(sys.modules), list(sys.path), Path.cwd()
    os.chdir(path)
    try:
        yield write
    finally:
        os.chdir(before)
        sys.path[:] = import_path
        for name in set(sys.modules) - modules:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(path)):
                del sys.modules[name]
