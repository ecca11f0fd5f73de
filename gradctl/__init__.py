"""gradctl: export, optimise and check the gradients of PyTorch graphs.

``import gradctl`` gives ``gradcheck``, ``compare`` and ``export``; torch is imported when one of them is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradctl.api import CheckFailed, CheckReport, compare, export, gradcheck
    from gradctl.core.errors import GradctlError

__version__ = "0.1.0"

__all__ = ["CheckFailed", "CheckReport", "GradctlError", "compare", "export", "gradcheck"]


def __getattr__(name: str) -> Any:
    """Return what the package gives, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "gradctl.core.errors" if name == "GradctlError" else "gradctl.api"
    globals()[name] = found = getattr(importlib.import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
