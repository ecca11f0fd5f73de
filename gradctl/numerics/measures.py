"""Inner products and relative errors of tensors. A complex tensor counts as its real and imaginary parts."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor


def dense(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient as a strided tensor, or None if there is no gradient."""
    return gradient.to_dense() if gradient is not None and gradient.layout != torch.strided else gradient


def dot(left: Tensor, right: Tensor) -> float:
    """Return the real inner product of two tensors of one shape: the sum over real and imaginary parts."""
    if left.is_complex() or right.is_complex():
        return float((left.resolve_conj().conj() * right).real.sum())
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))


def is_float(value: Any) -> TypeGuard[Tensor]:
    """Return whether a value is a dense tensor of floats, real or complex."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and (value.is_floating_point() or value.is_complex())
    )


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm of all elements."""
    return float(torch.linalg.vector_norm(tensor)) if tensor.numel() else 0.0


def relative_error(reference: Tensor, candidate: Tensor) -> float:
    """Return ||candidate - reference|| / ||reference|| over finite values; infinite where NaN or Inf masks differ.

    Zero against zero is 0; anything against zero is infinite.
    """
    if reference.shape != candidate.shape:
        return math.inf
    wide = torch.complex128 if reference.is_complex() else torch.float64
    reference, candidate = reference.detach().to(wide), candidate.detach().to(wide)
    finite = torch.isfinite(reference)
    if not same_values(reference[~finite], candidate[~finite]) or not bool(torch.isfinite(candidate[finite]).all()):
        return math.inf
    difference, size = norm(candidate[finite] - reference[finite]), norm(reference[finite])
    return 0.0 if difference == 0 else difference / size if size else math.inf


def same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether shape and elements are the same; NaN is the same as NaN, and nothing else is."""
    if one.shape != other.shape:
        return False
    missing = one.isnan()  # nan_to_num would make zeros of them, and large numbers of Inf
    return bool(torch.equal(missing, other.isnan())) and bool(torch.equal(one[~missing], other[~missing]))


def gaussian_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard Gaussian noise like ``tensor`` (shape, dtype, device), generated on the CPU."""
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device)
