"""The linear map that a custom Function's backward states, which replaces the Function beside the point.

A Function whose backward is not its derivative on purpose (straight-through, gradient reversal) is taken as that
states: beside the point it is y0 + J (x - x0), where J is the transpose of its own VJP, u ↦ VJP(u), differentiated in
the cotangent u.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradctl.numerics.measures import dense, dot
from gradctl.subject.torch_private import dirichlet_grad, saved_tensors_hooks_disabled
from gradctl.tracing.recording import BranchChanged
from gradctl.tracing.tracer import Apply


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """What a Function's backward states about one application: y0 + J (x - x0).

    Attributes:
        inputs: x0, by position of the argument.
        outputs: y0, and as recorded what is not a differentiable tensor.
        single: whether the Function returns one value, not a tuple.
        cotangents: u, zero; they require a gradient.
        transposed: VJP(u) by input position, with its graph in u.
        offsets: VJP(0) by input position: a gradient that backward adds from nothing (an auxiliary loss).
    """

    inputs: dict[int, Tensor]
    outputs: tuple[Any, ...]
    single: bool
    cotangents: list[Tensor]
    transposed: dict[int, Tensor]
    offsets: dict[int, Tensor]

    def push(self, tangents: dict[int, Tensor]) -> list[Tensor]:
        """Return J times the tangents, one tensor a differentiable output."""
        used = [i for i, vjp in self.transposed.items() if vjp.requires_grad]
        if not used:
            return [torch.zeros_like(u) for u in self.cotangents]
        found = torch.autograd.grad(
            [self.transposed[i] for i in used],
            self.cotangents,
            [tangents[i] for i in used],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(u) if c is None else c.detach() for u, c in zip(self.cotangents, found, strict=True)]

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, float]:
        """Return the outputs beside the point, and what the offsets add to the objective there."""
        if any(not isinstance(args[i], Tensor) or args[i].shape != x0.shape for i, x0 in self.inputs.items()):
            raise BranchChanged
        tangents = {i: args[i].detach() - x0 for i, x0 in self.inputs.items()}
        extra = sum(dot(offset, tangents[i]) for i, offset in self.offsets.items())
        changes = iter(self.push(tangents))
        values = tuple(
            (y.detach() + next(changes)).requires_grad_() if is_differentiable(y) else y for y in self.outputs
        )
        return (values[0] if self.single else values), extra


@dataclass(frozen=True, slots=True, eq=False)
class DirichletMap:
    """What the backward of a Dirichlet sample states, an implicit reparameterisation: it is no torch program's.

    ``slopes`` are those of ``torch._dirichlet_grad`` at the concentration and the sample of the point.
    """

    apply: Apply
    concentration: Tensor
    sample: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, apply: Apply, concentration: Tensor, sample: Tensor) -> DirichletMap:
        """Return the map of one sample."""
        x, at = sample.detach(), concentration.detach().clone()
        return cls(apply, at, x.clone(), dirichlet_grad(x, at, at.sum(-1, keepdim=True).expand_as(at)))

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, float]:
        """Return the sample beside the point; random numbers are drawn as at it."""
        self.apply(self.concentration)
        tangent = self.slopes * (args[0].detach() - self.concentration)
        return (self.sample + tangent - self.sample * tangent.sum(-1, keepdim=True)).requires_grad_(), 0.0


def linear_map(apply: Apply, args: tuple[Any, ...]) -> LinearMap | None:
    """Return the linear map that a Function's backward states at ``args``, or None.

    There is none if backward cannot be differentiated in its cotangent (``once_differentiable``, numpy
    inside), or is not affine in it (gradient clipping).
    """
    leaves = {i: arg for i, arg in enumerate(args) if is_differentiable(arg) and arg.layout == torch.strided}
    with torch.enable_grad(), keeps_what_it_saves():
        result = apply(*[leaves[i].clone() if i in leaves else arg for i, arg in enumerate(args)])
        outputs = result if isinstance(result, tuple) else (result,)
        cotangents = [torch.zeros_like(y).requires_grad_() for y in outputs if is_differentiable(y)]
        transposed = _vjp_with_graph(outputs, leaves, cotangents) if cotangents else None
    if transposed is None:
        return None
    offsets = {i: value.detach() for i, value in transposed.items() if bool(value.detach().any())}
    inputs = {i: leaf.detach() for i, leaf in leaves.items() if i in transposed}
    linear = LinearMap(inputs, outputs, not isinstance(result, tuple), cotangents, transposed, offsets)
    return linear if _is_affine(leaves, linear) else None


def keeps_what_it_saves() -> AbstractContextManager[None]:
    """Return a context in which tensors are saved as they are: a checkpoint around it counts what its body saves."""
    if saved_tensors_hooks_disabled() is not None:  # torch.func takes none
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _vjp_with_graph(
    outputs: tuple[Any, ...], leaves: dict[int, Tensor], cotangents: list[Tensor]
) -> dict[int, Tensor] | None:
    """Return VJP(u) by input position, with its graph in u; None if backward raises."""
    differentiable = [y for y in outputs if is_differentiable(y)]
    try:
        found = torch.autograd.grad(
            differentiable, list(leaves.values()), cotangents, create_graph=True, allow_unused=True
        )
    except Exception:  # the user's backward may raise anything; then it states no map
        return None
    return {i: value for i, value in zip(leaves, map(dense, found), strict=True) if value is not None}


def _is_affine(leaves: dict[int, Tensor], linear: LinearMap) -> bool:
    """Tell whether <VJP(u), p> = <VJP(0), p> + <u, J p> at random u, small and large."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.device, like.dtype)

    tangents = {i: gaussian(x, 1.0) for i, x in linear.inputs.items()}
    try:
        pushed = linear.push(tangents)
    except RuntimeError:  # once_differentiable speaks up only now
        return False
    offset = sum(dot(value, tangents[i]) for i, value in linear.offsets.items())
    for size in (1e-3, 1e3):
        cotangents = [gaussian(u, size).requires_grad_() for u in linear.cotangents]
        with torch.enable_grad(), keeps_what_it_saves():
            vjp = _vjp_with_graph(linear.outputs, leaves, cotangents)
        if vjp is None or vjp.keys() != linear.transposed.keys():
            return False
        left = sum(dot(value.detach(), tangents[i]) for i, value in vjp.items())
        right = offset + sum(dot(u.detach(), c) for u, c in zip(cotangents, pushed, strict=True))
        weight = sum(dot(value.detach().abs(), tangents[i].abs()) for i, value in vjp.items())
        if not abs(left - right) <= 1e-9 * (weight + abs(right)):
            return False
    return True


def is_differentiable(value: Any) -> bool:
    """Tell a tensor that requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad
