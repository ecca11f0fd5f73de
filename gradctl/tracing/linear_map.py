"""The linear map that a custom Function's backward states, which replaces the Function beside the point.

A Function whose backward intentionally is not its derivative (straight-through, gradient reversal) is y0 + J (x - x0)
beside the point, where J is the transpose of its own VJP, u ↦ VJP(u), differentiated in the cotangent u.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradctl.numerics.measures import dense, dot
from gradctl.subject.torch_private import dirichlet_grad, saved_tensors_hooks_disabled
from gradctl.tracing.recording import BranchChanged
from gradctl.tracing.tracer import Apply


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """The statement of a Function's backward about one application: y0 + J (x - x0)."""

    inputs: dict[int, Tensor]  # x0, by position of the argument
    outputs: tuple[Any, ...]  # y0, and the recorded values of outputs without a gradient
    single: bool  # whether the Function returns one value, not a tuple
    cotangents: list[Tensor]  # u, zero; they require a gradient
    transposed: dict[int, Tensor]  # VJP(u) by input position, with its graph in u
    offsets: dict[int, Tensor]  # VJP(0) by input position: a gradient that backward adds (an auxiliary loss)

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
        """Return the outputs beside the point, and the sum that the offsets add to the objective there."""
        if any(not isinstance(args[i], Tensor) or args[i].shape != x0.shape for i, x0 in self.inputs.items()):
            raise BranchChanged
        tangents = {i: args[i].detach() - x0 for i, x0 in self.inputs.items()}
        changes = iter(self.push(tangents))
        values = tuple(
            (y.detach() + next(changes)).requires_grad_() if is_differentiable(y) else y for y in self.outputs
        )
        return (values[0] if self.single else values), _inner_product(self.offsets, tangents)


@dataclass(frozen=True, slots=True, eq=False)
class DirichletMap:
    """The statement of the backward of a Dirichlet sample, an implicit reparameterisation in C code."""

    apply: Apply
    concentration: Tensor
    sample: Tensor
    slopes: Tensor  # by ``torch._dirichlet_grad`` at the concentration and the sample of the point

    @classmethod
    def of(cls, apply: Apply, concentration: Tensor, sample: Tensor) -> DirichletMap:
        """Return the map of one sample."""
        x, at = sample.detach(), concentration.detach().clone()
        return cls(apply, at, x.clone(), dirichlet_grad(x, at, at.sum(-1, keepdim=True).expand_as(at)))

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, float]:
        """Return the sample beside the point, with the random numbers of the point."""
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
        is_single = not isinstance(result, tuple)
        outputs = (result,) if is_single else result
        cotangents = [torch.zeros_like(y).requires_grad_() for y in filter(is_differentiable, outputs)]
        transposed = _vjp_with_graph(outputs, leaves, cotangents)
    if transposed is None:
        return None
    inputs = {i: leaves[i].detach() for i in transposed}
    offsets = {i: value.detach() for i, value in transposed.items() if bool(value.detach().any())}
    linear = LinearMap(inputs, outputs, is_single, cotangents, transposed, offsets)
    return linear if _is_affine(leaves, linear) else None


def keeps_what_it_saves() -> AbstractContextManager[None]:
    """Return a context in which tensors are saved as they are, unseen by a checkpoint around it, which counts them."""
    if saved_tensors_hooks_disabled() is not None:  # by torch.func
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _vjp_with_graph(
    outputs: tuple[Any, ...], leaves: dict[int, Tensor], cotangents: list[Tensor]
) -> dict[int, Tensor] | None:
    """Return VJP(u) by input position, with its graph in u; None without outputs, or if backward raises."""
    if not cotangents:
        return None
    roots, inputs = list(filter(is_differentiable, outputs)), list(leaves.values())
    try:
        found = torch.autograd.grad(roots, inputs, cotangents, create_graph=True, allow_unused=True)
    except Exception:  # the user's backward may raise anything; then it states no map
        return None
    return {i: value for i, value in zip(leaves, map(dense, found), strict=True) if value is not None}


def _is_affine(leaves: dict[int, Tensor], linear: LinearMap) -> bool:
    """Return whether <VJP(u), p> = <VJP(0), p> + <u, J p> at random u, small and large."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(like: Tensor, size: float) -> Tensor:
        return size * torch.randn(like.shape, dtype=torch.float64, generator=generator).to(like.device, like.dtype)

    tangents = {i: gaussian(x, 1.0) for i, x in linear.inputs.items()}
    try:
        pushed = linear.push(tangents)
    except RuntimeError:  # once_differentiable raises only now
        return False
    offset = _inner_product(linear.offsets, tangents)
    for size in (1e-3, 1e3):
        cotangents = [gaussian(u, size).requires_grad_() for u in linear.cotangents]
        with torch.enable_grad(), keeps_what_it_saves():
            vjp = _vjp_with_graph(linear.outputs, leaves, cotangents)
        if vjp is None or vjp.keys() != linear.transposed.keys():
            return False
        left = _inner_product(vjp, tangents)
        right = offset + sum(dot(u.detach(), c) for u, c in zip(cotangents, pushed, strict=True))
        weight = sum(dot(value.detach().abs(), tangents[i].abs()) for i, value in vjp.items())
        if not abs(left - right) <= 1e-9 * (weight + abs(right)):
            return False
    return True


def _inner_product(gradients: dict[int, Tensor], tangents: dict[int, Tensor]) -> float:
    return sum(dot(gradient.detach(), tangents[i]) for i, gradient in gradients.items())


def is_differentiable(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a tensor that requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad
