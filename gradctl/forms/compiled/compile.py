"""``torch.compile`` with inductor."""

from __future__ import annotations

from gradctl.forms.compiled.dynamo import compiled_with
from gradctl.forms.form import Captured
from gradctl.subject.instance import Instance

__all__ = ["capture", "to_float64"]


def capture(instance: Instance) -> Captured:
    """Return the model compiled with inductor, random numbers drawn as eager draws them (pytorch 113169).

    Raises:
        CannotCapture: as ``compiled_with``.
    """
    # As an option it also holds for what another input has compiled later; a patch of the configuration would not.
    return compiled_with("compile", instance, "inductor", {"options": {"fallback_random": True}})


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy compiled anew: Dynamo runs eagerly under a dispatch mode."""
    return capture(instance)
