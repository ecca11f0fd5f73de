"""``torch.jit.trace``: the operators of one run, recorded. Branches, loops and Python numbers are baked in."""

from __future__ import annotations

from typing import Any

import torch

from gradctl.forms.form import Captured
from gradctl.forms.torchscript import captured_by, widened
from gradctl.subject.instance import Instance

__all__ = ["capture", "widened"]

_trace: Any = torch.jit.trace  # torch gives it no types


def capture(instance: Instance) -> Captured:
    """Return the model traced on its own inputs; tracing's own check is left to the comparison.

    Raises:
        CannotCapture: as ``captured_by``.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    if kwargs:
        captured = captured_by(
            "trace",
            lambda: _trace(
                instance.model,
                example_inputs=args or None,
                example_kwarg_inputs=kwargs,
                check_trace=False,
                strict=False,
            ),
        )
    else:
        captured = captured_by("trace", lambda: _trace(instance.model, args, check_trace=False, strict=False))
    instance.restore()  # tracing runs the model, which moves the very buffers that the script shares
    return captured
