"""The model itself, as a form: what all others are held against."""

from __future__ import annotations

from gradctl.forms.form import Captured
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of

__all__ = ["capture", "to_float64"]


def capture(instance: Instance) -> Captured:
    """Return the private copy as it is."""
    return of_module("eager", instance, instance.model)


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy as it is."""
    return capture(instance)


def of_module(form: str, instance: Instance, call: object, *, seconds: float = 0.0) -> Captured:
    """Return a form that runs on the very tensors of the private copy (compiled code, eager itself)."""
    module = module_of(instance.model)
    held = {
        name.removeprefix("param:"): leaf.tensor
        for leaf in instance.leaves
        for name in (leaf.name, *leaf.tied)
        if not name.startswith("input:")
    }
    return Captured(
        form,
        call,  # type: ignore[arg-type]  # a callable in, a callable out
        {**held, **(dict(module.named_parameters(remove_duplicate=False)) if module is not None else {})},
        dict(module.named_buffers(remove_duplicate=False)) if module is not None else {},
        seconds,
        model=instance.model if module is None else module,
    )
