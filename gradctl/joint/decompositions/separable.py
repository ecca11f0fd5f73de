"""Separable linear maps of images, a matrix for each spatial axis: average pooling, and interpolation.

With y = A x Bᵀ, the gradient by x is Aᵀ dy B; matrices have the shape ``[size of the output, size of the input]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the dtype in which torch accumulates sums: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def positions(size: int, x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return 0, 1, … up to ``size`` on the device of ``x``."""
    return torch.arange(size, device=x.device, dtype=dtype)


def apply(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return ``x`` with its last axes multiplied by their matrices; a copy, in the dtype of ``x``."""
    found = x.to(accumulation_type(x))
    for axis, matrix in enumerate(matrices, start=x.ndim - len(matrices)):
        kept = found.shape
        if axis == x.ndim - 1:
            found = found @ matrix.to(found.dtype).T
        else:
            product = matrix.to(found.dtype) @ found.flatten(axis + 1)
            found = product.reshape(*kept[:axis], matrix.shape[0], *kept[axis + 1 :])
    return found.to(x.dtype)


def apply_transposed(dy: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return the gradient of ``apply`` by its ``x``."""
    return apply(dy, [matrix.T for matrix in matrices])
