"""Runs of a form: outputs, gradients and state of three calls in a row, from the same state and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradctl.core.names import buffer_name, input_name
from gradctl.forms.form import Captured, Outcome, gradient_of
from gradctl.numerics.measures import gaussian_like, same_values
from gradctl.subject.frames import is_out_of_memory
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.state import State

__all__ = ["CALLS", "cotangents_of", "outcomes"]

# TorchScript's own autodiff starts at the second or third call, and state that is not put back accumulates.
CALLS = 3


def outcomes(
    captured: Captured,
    instance: Instance,
    state: State,
    *,
    differentiable: frozenset[str] | None = None,
    calls: int = CALLS,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Outcome]:
    """Return what the calls gave; after one that raised there is no other.

    Args:
        captured: the form to run.
        instance: where the inputs come from.
        state: of the form, put back before the first call.
        differentiable: outputs that get a cotangent (those with a gradient in eager); None gives one to each that asks.
        calls: how many in a row.
        context: entered around each call and its backward.
    """
    instance.restore()
    state.restore()
    found = []
    for _ in range(calls):
        try:
            found.append(_one_call(captured, instance, differentiable, context))
        except Exception as error:  # the form or the user's model may raise anything
            if is_out_of_memory(error):
                raise
            found.append(Outcome(error=error))
            break
    for leaf in instance.leaves:
        gradient_of(leaf, captured)
    return found


def _one_call(
    captured: Captured,
    instance: Instance,
    differentiable: frozenset[str] | None,
    context: Callable[[], AbstractContextManager[Any]],
) -> Outcome:
    for leaf in instance.leaves:
        gradient_of(leaf, captured)
    args, kwargs = instance.inputs()
    given = _named(instance, args, kwargs)
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    with context(), torch.enable_grad():
        outputs = dict(instance.call(captured.call, args, kwargs))
    asked = {
        name: t for name, t in outputs.items() if t.requires_grad and (differentiable is None or name in differentiable)
    }
    # Drawn outside the context: under the promotion random numbers are drawn in the native dtype, and are others.
    cotangents = cotangents_of(outputs, instance.subject.seed)
    if asked:
        with context():
            torch.autograd.backward(list(asked.values()), [cotangents[name] for name in asked])
    return Outcome(
        {name: t.detach().clone() for name, t in outputs.items()},
        {leaf.name: gradient_of(leaf, captured) for leaf in instance.leaves},
        {
            **{buffer_name(name): buffer.detach().clone() for name, buffer in captured.buffers_now().items()},
            **{name: t.detach().clone() for name, t in given.items() if not same_values(before[name], t.detach())},
        },
        frozenset(name for name, t in outputs.items() if t.requires_grad),
    )


def cotangents_of(outputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a Gaussian cotangent for each float output, the same in every form and dtype."""
    generator = torch.Generator().manual_seed(seed)
    floats = {name: t.detach() for name, t in outputs.items() if t.is_floating_point() or t.is_complex()}
    wide = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in floats.items()}
    return {name: gaussian_like(wide[name], generator).to(t.dtype) for name, t in floats.items()}


def _named(instance: Instance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    named = input_names(instance.subject.model, args, kwargs)
    return {input_name(name): value for name, value in named if isinstance(value, Tensor)}
