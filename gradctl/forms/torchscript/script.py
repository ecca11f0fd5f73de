"""``torch.jit.script``: the source of forward, compiled."""

from __future__ import annotations

import torch

from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.torchscript.scripted_module import capture_script
from gradctl.subject.instance import Instance


def capture(instance: Instance) -> Captured:
    """Return the model scripted.

    Raises:
        CannotCapture: as ``capture_script``; the model is a lambda, or its scripted module has no ``forward``.
    """
    if getattr(instance.model, "__name__", "") == "<lambda>":
        raise CannotCapture(
            "torch.jit.script compiles source, and a lambda or autograd.Function has none that it reads."
        )
    captured = capture_script("script", lambda: torch.jit.script(instance.model))
    if isinstance(captured.artifact, torch.nn.Module) and not hasattr(captured.artifact, "forward"):
        name = type(instance.model).__name__
        raise CannotCapture(
            f"torch.jit.script leaves out the overloaded forward of {name}; call it from a module of your own."
        )
    return captured
