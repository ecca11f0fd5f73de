"""Directional derivatives of a model: a model that returns them, by two backward passes of eager's autograd.

The JVP J·v is the derivative of the VJP Jᵀ·u with respect to its cotangent u: so custom backwards, ``detach``,
``no_grad`` and hooks have the effect that they have on gradients, which forward-mode AD does not promise. The
Hessian-vector product (HVP) H·v is the gradient of <gradient, v>.

Source: J. Townsend, "A new trick for calculating Jacobian vector products" (2017); ``torch.autograd.functional.jvp``.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradctl.core.errors import TargetError, listed, nearest
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import optimized_inner, parameters_of
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

# The argument of a derivative model with its tangents, by the name of the leaf in the joint graph.
TANGENT = "tangent"
_INPUT = "input."

Tensors = Sequence[Tensor]
# Returns the results for an output of the model, the leaves by name and their tangents.
Derive = Callable[[Any, Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Any]]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention by operators whose backward can be differentiated."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def jvp_of(outputs: Tensors, by: Tensors, tangents: Tensors) -> Tensors:
    """Return J·tangents, a tensor like each of the ``outputs``, which require a gradient, as functions of ``by``."""
    cotangents = [torch.zeros_like(each).requires_grad_() for each in outputs]
    vjp = torch.autograd.grad(outputs, by, cotangents, create_graph=True, allow_unused=True)
    return _grad_of_product(vjp, tangents, cotangents)


def hvp_of(loss: Tensor, by: Tensors, tangents: Tensors) -> tuple[Tensors, Tensors]:
    """Return the gradient of a scalar with respect to ``by``, and H·tangents; zeros if it does not depend on them."""
    gradient = torch.autograd.grad(loss, by, create_graph=True, allow_unused=True)
    product = _grad_of_product(gradient, tangents, by)
    return [torch.zeros_like(one) if g is None else g for g, one in zip(gradient, by, strict=True)], product


def _grad_of_product(found: Sequence[Tensor | None], tangents: Tensors, by: Tensors) -> Tensors:
    """Return the gradient of <found, tangents> with respect to ``by``."""
    pairs = [(g, v) for g, v in zip(found, tangents, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(each) for each in by]
    roots, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(roots, by, weights, retain_graph=True, allow_unused=True, materialize_grads=True)


def derivative_subject(subject: Subject, graph: str, wrt: Sequence[str] = ()) -> Subject:
    """Return a subject whose model returns ``output`` and directional derivatives, by eager's autograd.

    Its model takes one input more, ``tangent``: a dict of a tensor for each leaf that is differentiated, by
    ``input.x`` and ``fc1.weight``. It returns ``output``, and ``jvp`` by the name of each output that requires a
    gradient; or, for a scalar, ``grad`` and ``hvp`` by the name of the leaf.

    Args:
        subject: the model and its inputs; not changed. It has no loss beside the model.
        graph: ``jvp`` or ``hvp``.
        wrt: the leaves, globs of ``param:fc1.weight`` and ``input:x``; all float inputs if empty.

    Raises:
        TargetError: GC104 if no leaf matches; GC113 if ``hvp`` is not of one scalar.
    """
    model = optimized_inner(subject.model)
    names = leaf_names(subject, graph, wrt)
    if graph == "hvp":
        _ensure_scalar(subject)
    derive = _jvp if graph == "jvp" else _hvp
    generator = torch.Generator().manual_seed(subject.seed + 1)
    values = _leaves_by_name(model, subject.args, subject.kwargs, parameters_of(model))
    tangents = {
        name: torch.randn(values[name].shape, generator=generator, dtype=values[name].dtype).to(values[name].device)
        for name in names
    }
    if TANGENT in subject.kwargs or any(each.startswith(f"{TANGENT}.") for each in values):
        raise TargetError("GC104", f"{subject.target} uses the name {TANGENT!r}, which is that of the new inputs.")
    derived = _derived_module(model, derive) if isinstance(model, nn.Module) else _derived_function(model, derive)
    return replace(subject, model=derived, kwargs={**subject.kwargs, TANGENT: tangents})


def leaf_names(subject: Subject, graph: str, wrt: Sequence[str]) -> list[str]:
    """Return the names of the leaves to differentiate by, in the joint graph (``input.x``, ``fc1.weight``).

    Raises:
        TargetError: GC104 if ``wrt`` matches no such leaf, or if no input is one.
    """
    named = _leaves_by_name(subject.model, subject.args, subject.kwargs, parameters_of(subject.model))
    floats = {name: each for name, each in named.items() if each.is_floating_point()}
    reported = {report_name(name): name for name in floats if name.startswith(_INPUT) or floats[name].requires_grad}
    wanted = [each for each in reported if any(fnmatch.fnmatchcase(each, pattern) for pattern in wrt or ["input:*"])]
    if wanted:
        return [reported[each] for each in wanted]
    if wrt:
        said = f"--wrt {' '.join(wrt)} matches nothing that requires a gradient{nearest(wrt[0], reported)}"
        raise TargetError("GC104", f"{said}: there are {listed(list(reported)) or 'none'}.")
    said = f"--graph {graph} differentiates by float inputs, and {subject.target} has none"
    raise TargetError("GC104", f"{said}. Name parameters, for example --wrt 'param:*'.")


def report_name(name: str) -> str:
    """Return the report's name of a leaf in the joint graph: ``input:x`` of ``input.x``, ``param:fc1.weight``."""
    return input_name(name.removeprefix(_INPUT)) if name.startswith(_INPUT) else parameter_name(name)


def port_name(name: str) -> str:
    """Return the name in a file of an input or output in the forward graph of a derivative model."""
    for inner, outer in ((f"{_INPUT}{TANGENT}.", f"{TANGENT}."), ("output.", "")):
        if name.startswith(inner):
            return outer + name.removeprefix(inner)
    return name


def inner_name(port: str) -> str:
    """Return the name in the forward graph of a derivative model of an input or output in a file."""
    if port.startswith(f"{TANGENT}."):
        return f"{_INPUT}{port}"
    kind = port.partition(".")[0]
    return f"output.{port}" if kind in {"output", "grad", "jvp", "hvp"} else port


def _derived_module(model: nn.Module, derive: Derive) -> nn.Module:
    kind = type(model)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(functools.partial(kind.__call__, self), self, dict(self.named_parameters()), derive, args, kwargs)

    # Of a class of its own: a copy of the module, which every run is made on, keeps that.
    derived: nn.Module = object.__new__(type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__}))
    derived.__dict__ = dict(model.__dict__)
    return derived


def _derived_function(model: Callable[..., Any], derive: Derive) -> Callable[..., Any]:
    @functools.wraps(model)
    def derived(*args: Any, **kwargs: Any) -> Any:
        return _call(model, model, {}, derive, args, kwargs)

    return derived


def _call(  # noqa: PLR0917 a call of a model, and its arguments
    call: Callable[..., Any],
    model: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    derive: Derive,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the results of ``derive`` for one call of a model."""
    tangents: dict[str, Tensor] = kwargs[TANGENT]
    others = {name: value for name, value in kwargs.items() if name != TANGENT}
    names = iter([f"{_INPUT}{name}" for name, _ in input_names(model, args, others)])
    by: dict[str, Tensor] = {}

    def given(_: str, leaf: Any) -> Any:
        name = next(names)
        if name in tangents:
            by[name] = leaf = leaf.detach().requires_grad_()
        return leaf

    with twice_differentiable():
        args, others = map_leaves(given, (args, others))
        by |= {name: parameters[name] for name in tangents if name in parameters}
        found = derive(call(*args, **others), {name: by[name] for name in tangents}, tangents)
        return map_leaves(lambda _, leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, found)  # type: ignore[no-any-return]


def _jvp(value: Any, by: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> dict[str, Any]:
    outputs = differentiable(value)
    found = jvp_of(list(outputs.values()), list(by.values()), list(tangents.values()))
    return {"output": value, "jvp": dict(zip(outputs, found, strict=True))}


def _hvp(value: Any, by: Mapping[str, Tensor], tangents: Mapping[str, Tensor]) -> dict[str, Any]:
    ((_, loss),) = [each for each in leaves(value) if isinstance(each[1], Tensor)]
    gradient, product = hvp_of(loss.sum(), list(by.values()), list(tangents.values()))
    return {"output": value, "grad": dict(zip(by, gradient, strict=True)), "hvp": dict(zip(by, product, strict=True))}


def differentiable(value: Any) -> dict[str, Tensor]:
    """Return the outputs that require a gradient, by name."""
    named = {output_name(path): leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor)}
    return {name: each for name, each in named.items() if each.requires_grad}


def _ensure_scalar(subject: Subject) -> None:
    """Raise unless the model returns one differentiable scalar."""
    outputs = [(name, each) for name, each in Instance(subject).run() if isinstance(each, Tensor)]
    if len(outputs) == 1 and outputs[0][1].numel() == 1 and outputs[0][1].requires_grad:
        return
    shapes = ", ".join(f"{name} of shape {list(each.shape)}" for name, each in outputs)
    said = f"--graph hvp is of one scalar that requires a gradient, and {subject.target} returns {shapes}"
    raise TargetError("GC113", f"{said}. Add --loss NAME, a function of the outputs that returns a scalar.")


def _leaves_by_name(
    model: Callable[..., Any], args: Any, kwargs: Any, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    named = {f"{_INPUT}{name}": each for name, each in input_names(model, args, kwargs) if isinstance(each, Tensor)}
    return {**named, **parameters}
