"""From a model and its inputs, as a program in Python has them, to a ``Subject``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from gradctl.core.errors import TargetError
from gradctl.subject.inputs.example import inputs_from_call
from gradctl.subject.loading.closure import adopt_modules
from gradctl.subject.loading.load import ensure_loss, refuse_meta, training_note
from gradctl.subject.signature import function_class, is_subclass, optimized_inner, parameters_of
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves


def make_subject(
    model: Callable[..., Any],
    inputs: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Subject:
    """Return a model that is there already, with its inputs; neither is changed.

    The arguments are those of ``gradctl.gradcheck``; modules that a function uses become part of the model.

    Raises:
        TargetError: GC109 not a model, or one without values; GC104 the inputs do not fit; GC113 invalid ``loss``.
    """
    if is_subclass(model, Function):
        model = model.apply  # type: ignore[attr-defined]
    name = _name(model)
    if inspect.isclass(model):
        raise TargetError("GC109", f"the model is the class {name!r}. Give an object of it: {name}(…).")
    if not callable(model):
        raise TargetError(
            "GC109",
            f"the model is of type {type(model).__name__!r}. Give an nn.Module, a function of tensors, or an "
            "autograd.Function.",
        )
    if loss is not None:
        ensure_loss(loss, "the loss")
    model = adopt_modules(model)
    refuse_meta(model, name)
    args, named = inputs_from_call(inputs, kwargs or {}, model)
    note = training_note(model, "call eval() first if this is not intended")
    notes = () if note is None else (note,)
    return Subject(name, model, args, named, function_class(model), loss, seed, notes)


def device_of(subject: Subject) -> str:
    """Return the device of the model's first tensor, or of the first input."""
    given = [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    tensors = [*parameters_of(subject.model).values(), *given]
    return str(tensors[0].device) if tensors else "cpu"


def _name(model: Any) -> str:
    """Return what a report calls the model: the class of a module, the name of a function."""
    function = function_class(model)
    if function is not None:
        return function.__name__
    inner = optimized_inner(model)
    if isinstance(inner, nn.Module):
        return type(inner).__name__
    return str(getattr(model, "__name__", type(model).__name__))
