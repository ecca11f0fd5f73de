"""``torch.jit.script``: the source of forward, compiled."""

from __future__ import annotations

import torch

from gradctl.forms.form import Captured
from gradctl.forms.torchscript import captured_by, widened
from gradctl.subject.instance import Instance

__all__ = ["capture", "widened"]


def capture(instance: Instance) -> Captured:
    """Return the model scripted.

    Raises:
        CannotCapture: as ``captured_by``.
    """
    return captured_by("script", lambda: torch.jit.script(instance.model))
