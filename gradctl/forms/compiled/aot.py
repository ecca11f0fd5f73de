"""AOTAutograd with eager kernels: what ``torch.compile`` captures, forward and backward, before inductor."""

from __future__ import annotations

from gradctl.forms.compiled.dynamo import compiled_with
from gradctl.forms.form import Captured
from gradctl.subject.instance import Instance

__all__ = ["capture", "to_float64"]


def capture(instance: Instance) -> Captured:
    """Return the model compiled with the backend ``aot_eager``.

    Raises:
        CannotCapture: as ``compiled_with``.
    """
    return compiled_with("aot", instance, "aot_eager", {})


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy compiled anew: Dynamo runs eagerly under a dispatch mode."""
    return capture(instance)
