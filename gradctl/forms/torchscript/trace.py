"""``torch.jit.trace``: the operators of one run, recorded. Branches, loops and Python numbers are fixed at capture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.torchscript.scripted_module import capture_script
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import POSITIONAL, call_signature


def capture(instance: Instance) -> Captured:
    """Return the model traced on its own inputs; the comparison replaces the check of torch.jit.trace.

    Raises:
        CannotCapture: as ``capture_script``, or an input is not a tensor.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    for name, value in input_names(instance.model, args, kwargs):
        if not isinstance(value, Tensor):
            raise CannotCapture(f"torch.jit.trace accepts tensors only, and input {name!r} is {value!r:.40}.")
    seed_generators(instance.subject.seed + 1)  # not the seed of a run: a number fixed at capture must differ
    values = (*args, *(kwargs[name] for name in _ordered(instance.model, kwargs)))
    captured = capture_script("trace", lambda: _trace(instance.model, len(args), kwargs, values))
    instance.restore()  # tracing runs the model, which moves the very buffers that the script shares
    return captured


def _trace(model: Callable[..., Any], count: int, kwargs: Mapping[str, Any], values: tuple[Any, ...]) -> Any:
    trace: Any = torch.jit.trace  # torch gives it no types
    if not kwargs or isinstance(model, torch.jit.ScriptModule):
        return trace(model, values, check_trace=False, strict=False)
    if not isinstance(model, nn.Module):
        return trace(_by_position(model, model, count, kwargs), values, check_trace=False, strict=False)
    own = vars(model).get("forward")
    # The module itself is traced, with a temporary forward, so that its parameters keep their names.
    model.forward = _by_position(model, model.forward, count, kwargs)
    try:
        return trace(model, values, check_trace=False, strict=False)
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _by_position(
    model: Callable[..., Any], called: Callable[..., Any], count: int, kwargs: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return ``called`` with the keyword inputs after its ``count`` positional ones, under their names.

    torch.jit.trace takes inputs of one kind only, and no keyword-only inputs.
    """
    ordered = _ordered(model, kwargs)

    def forward(*values: Any) -> Any:
        return called(*values[:count], **dict(zip(ordered, values[count:], strict=True)))

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in (*_positional_names(model, count, kwargs), *ordered)
        ]
    )
    return forward


def _ordered(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of the keyword inputs in the order of the signature, others after them."""
    signature = call_signature(model)
    known = [name for name in (signature.parameters if signature else ()) if name in kwargs]
    return [*known, *(name for name in kwargs if name not in known)]


def _positional_names(model: Callable[..., Any], count: int, kwargs: Mapping[str, Any]) -> list[str]:
    """Return names for the positional inputs: of their parameters, or numbered for ``*args``."""
    signature = call_signature(model)
    parameters = signature.parameters.values() if signature else ()
    names = [each.name for each in parameters if each.kind in POSITIONAL and each.name not in kwargs][:count]
    return [*names, *(f"input_{number}" for number in range(len(names), count))]
