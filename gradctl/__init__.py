"""gradctl: export, optimise and check the gradients of PyTorch graphs.

``import gradctl`` has ``gradcheck``, ``compare``, ``export``, ``snapshot`` and ``verify``; torch is imported when one
of them is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradctl.api import compare, export, gradcheck, snapshot, verify
    from gradctl.check_report import CheckFailed, CheckReport
    from gradctl.core.errors import GradctlError

__version__ = "0.1.0"

__all__ = ["CheckFailed", "CheckReport", "GradctlError", "compare", "export", "gradcheck", "snapshot", "verify"]
_ELSEWHERE = {
    "GradctlError": "gradctl.core.errors",
    **dict.fromkeys(("CheckFailed", "CheckReport"), "gradctl.check_report"),
}


def __getattr__(name: str) -> Any:
    """Return what the package gives, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_ELSEWHERE.get(name, "gradctl.api"))
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
