"""The packages of runtimes, which are installed on request."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from gradctl.forms.form import CannotCapture
from gradctl.subject.frames import first_line


def import_package(name: str, extra: str) -> ModuleType:
    """Return a module of a package that is in an extra of gradctl.

    Raises:
        CannotCapture: the package is not installed, or cannot be imported.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise CannotCapture(f"{package} is not installed: pip install 'gradctl[{extra}]'.")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that is half installed may raise anything
        raise CannotCapture(f"{package} cannot be imported: {first_line(error)}.") from error
