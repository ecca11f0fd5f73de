"""The model itself, as a form: the reference of all others."""

from __future__ import annotations

from gradctl.forms.form import Captured, named_tensors
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of


def capture(instance: Instance) -> Captured:
    """Return the private copy as it is."""
    return wrap_module("eager", instance, instance.model)


def wrap_module(form: str, instance: Instance, call: object, *, seconds: float = 0.0) -> Captured:
    """Return a form that runs on the tensors of the private copy themselves (compiled code, eager itself)."""
    module = module_of(instance.model)
    parameters, buffers = named_tensors(module)
    own = {
        name.removeprefix("param:"): leaf.tensor
        for leaf in instance.leaves
        for name in (leaf.name, *leaf.tied)
        if not name.startswith("input:")
    }
    return Captured(
        form,
        call,  # type: ignore[arg-type]  # a callable in, a callable out
        {**own, **parameters},
        buffers,
        seconds,
        model=instance.model if module is None else module,
    )
