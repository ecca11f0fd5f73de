"""One tolerance for two runs of one function: on another version or machine, in another order of sums, as more steps.

A relative tolerance alone fails on gradients that are zero by cancellation (the key bias of attention changes by its
own size with the number of threads). So the tolerance has two parts: one relative to the norm, and the noise: the
change of the tensor when weights and inputs move by one ULP. Measured on torch 2.13 CPU (threads, AVX, a batch in
halves): honest changes are within 3.0 times that noise, and within 2e-13 of the norm in float64 where the noise is
zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradctl.numerics.measures import norm

# Seeds of the runs that measure the noise.
NOISE_SEEDS = (1, 2)
_TIMES_NOISE = 10.0
_FLOAT64_RELATIVE = 1e-12
_NATIVE_EPSILONS = 8.0
# A tensor whose noise exceeds this part of its norm is zero by cancellation: what remains of it is rounding.
_CANCELLED_FLOAT64 = 1e-4
_CANCELLED_NATIVE = 0.1


def repetition_tolerance(scale: float, noise: float, dtype: torch.dtype) -> float:
    """Return the largest norm of the difference between two right runs.

    Args:
        scale: norm of the tensor; of one that is zero by cancellation, the largest norm of its neighbours.
        noise: norm of its change when weights and inputs move by one ULP of ``dtype``.
        dtype: of the run; the rule for float64 applies to complex128, too.
    """
    relative = _FLOAT64_RELATIVE if _is_float64(dtype) else _NATIVE_EPSILONS * torch.finfo(dtype).eps
    return relative * scale + _TIMES_NOISE * noise


def is_cancelled(scale: float, noise: float, dtype: torch.dtype) -> bool:
    """Return whether a tensor is zero by cancellation; an exact zero without noise is not."""
    return noise > (_CANCELLED_FLOAT64 if _is_float64(dtype) else _CANCELLED_NATIVE) * scale


def noise_of(tensor: Tensor, moved: Iterable[Tensor | None]) -> float:
    """Return the largest norm of the change of a float tensor in runs with moved weights and inputs."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    alike = [each for each in moved if each is not None and each.shape == tensor.shape]
    return max((norm(each.to(wide) - tensor.to(wide)) for each in alike), default=0.0)


def _is_float64(dtype: torch.dtype) -> bool:
    return dtype in (torch.float64, torch.complex128)
