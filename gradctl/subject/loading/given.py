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
from gradctl.subject.loading.load import refuse_meta, training_note
from gradctl.subject.signature import function_class, module_of, optimized_inner
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
    if inspect.isclass(model) and issubclass(model, Function):
        model = model.apply
    name = _name(model)
    if inspect.isclass(model):
        raise TargetError("GC109", f"the model is the class {name!r}. Give an object of it: {name}(…).")
    if not callable(model):
        raise TargetError(
            "GC109",
            f"the model is of type {type(model).__name__!r}. Give an nn.Module, a function of tensors, or an "
            "autograd.Function.",
        )
    if loss is not None and (inspect.isclass(loss) or not callable(loss)):
        kind = "a class" if inspect.isclass(loss) else f"of type {type(loss).__name__!r}"
        raise TargetError("GC113", f"the loss is {kind}, not a function of the outputs.")
    model = adopt_modules(model)
    refuse_meta(model, name)
    fitted = inputs_from_call(inputs, kwargs or {}, model)
    note = training_note(model, "call eval() first if this is not intended")
    notes = () if note is None else (note,)
    return Subject(name, model, fitted.args, fitted.kwargs, function_class(model), loss, seed, notes)


def device_of(subject: Subject) -> str:
    """Return the device of the model's first tensor, or of the first input."""
    owner = module_of(subject.model)
    given = [leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    tensors = [*(owner.parameters() if owner is not None else ()), *given]
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
