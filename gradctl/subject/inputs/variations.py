"""More inputs than the example: they reveal what a form fixed at capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gradctl.subject.inputs.dynamic_sizes import Dynamic, by_leaf
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves


def vary(subject: Subject, name: str) -> Subject:
    """Return the subject with its inputs varied: ``example``, ``seed``, ``flipped signs`` or ``non-contiguous``."""
    return map_tensors(subject, VARIATIONS[name])


def draw_inputs(subject: Subject, seed: int) -> Subject:
    """Return the subject with new random inputs of the same shapes, sizes and sets of integers."""
    generator = torch.Generator().manual_seed(seed)
    return map_tensors(subject, lambda tensor: redraw(tensor, generator))


def lengthen(subject: Subject, dynamic: Dynamic) -> Subject:
    """Return the subject with each free axis one longer, its last slice repeated.

    Raises:
        TargetError: GC104 if ``dynamic`` names an input or an axis that is not there.
    """
    free = iter(leaves(by_leaf(subject.model, subject.args, subject.kwargs, dynamic, frozenset)))

    def lengthened(_: str, leaf: object) -> object:
        _, axes = next(free)  # None for all but tensors
        for axis in axes or ():
            assert isinstance(leaf, Tensor)
            leaf = torch.cat([leaf, leaf.narrow(axis, -1, 1)], axis)
        return leaf

    args, kwargs = map_leaves(lengthened, (subject.args, subject.kwargs))
    return dataclasses.replace(subject, args=args, kwargs=kwargs)


def map_tensors(subject: Subject, function: Callable[[Tensor], Tensor]) -> Subject:
    """Return the subject with ``function(tensor)`` in place of each tensor among its inputs."""
    args, kwargs = map_leaves(
        lambda _, leaf: function(leaf.detach()) if isinstance(leaf, Tensor) else leaf, (subject.args, subject.kwargs)
    )
    return dataclasses.replace(subject, args=args, kwargs=kwargs)


def redraw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return floats drawn with the same root mean square, and integers in another order (each index stays legal)."""
    if tensor.layout != torch.strided or not tensor.numel():
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.reshape(-1)[order].reshape(tensor.shape)
    finite = torch.isfinite(tensor)
    size = tensor[finite].abs().double().square().mean().sqrt() if bool(finite.any()) else torch.tensor(1.0)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device) * size
    return torch.where(finite, drawn.to(tensor.dtype), tensor)


def _flipped(tensor: Tensor) -> Tensor:
    return -tensor if tensor.is_floating_point() or tensor.is_complex() else tensor


def _strided(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        return tensor
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1).select(-1, 0)


VARIATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "example": lambda tensor: tensor,
    "seed": lambda tensor: redraw(tensor, torch.Generator().manual_seed(1)),
    "flipped signs": _flipped,
    "non-contiguous": _strided,
}
