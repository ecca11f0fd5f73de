"""The error of a form in one tensor, and its tolerance: the error that rounding explains.

The tolerance is measured, not guessed: four times the error of eager's own native run, against float64. A tensor whose
true value is zero by cancellation (attention's key bias) is judged relative to the scale of its neighbours. Elements
beside others that are a thousand times larger (a mask of -1e9) are judged by themselves. Eager's own error shows which
is which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradctl.numerics.measures import norm

_TIMES_EAGER = 4.0
# Rounding that eager happens not to show: another order of a sum, a fused multiply-add.
_FLOOR_EPSILONS = 64.0
# 64 epsilons are 0.06 in float16 and 0.5 in bfloat16. Measured on 58 right models (torch 2.13 CPU; trace, script,
# export, aot; 4000 tensors in each of bfloat16, float16, float32): (error - 4 * eager's own error) / epsilon, the worst
# over inputs and calls, was never above 0 for outputs, buffers, and gradients that persist on fresh inputs. Of four of
# them with inductor: 0 in the narrow dtypes (5.4 for a gradient that did not persist), 1.9 in float32.
_NARROW_FLOOR_EPSILONS = 8.0
# The norm of so few elements can be right by luck: that of n normal ones is 4 times another's with a chance of 0.16 for
# n = 1, 0.01 for 4, 3e-4 for 8.
_FEW_ELEMENTS = 8
_CANCELLED = 1e-6
# Eager's own error in a tensor that is zero by cancellation is many times the tensor's scale.
_KNOWN = 0.1
# Powers of two without an element, between elements that are judged by themselves and larger ones.
_GAP = 10


def agreement(native: Tensor, oracle: Tensor, candidate: Tensor, neighbours: float) -> tuple[float, float]:
    """Return ||candidate - oracle|| / scale, and the part of it that rounding explains.

    Args:
        native: eager's tensor, in its own dtype.
        oracle: the same in float64 (or ``native`` again, where there is no float64 run).
        candidate: that of the form, of the same shape and dtype as ``native``.
        neighbours: the largest norm among tensors of this kind.
    """
    if not (native.is_floating_point() or native.is_complex()):
        return (0.0 if torch.equal(native, candidate) else math.inf), 0.0
    found = _agreement(native, oracle, candidate, neighbours)
    small = _small_elements(native, oracle) if math.isfinite(found[0]) else None
    if small is None:
        return found
    alone = _agreement(native[small], oracle[small], candidate[small], 0.0)
    return max(found, alone, key=lambda each: each[0] / each[1])


def _agreement(native: Tensor, oracle: Tensor, candidate: Tensor, neighbours: float) -> tuple[float, float]:
    off = norm_of_difference(native, oracle)
    is_known = native.dtype != oracle.dtype and math.isfinite(off)
    scale = scale_beside(oracle, neighbours, off if is_known else None, torch.finfo(native.dtype).eps)
    return norm_of_difference(candidate, oracle) / scale, _TIMES_EAGER * off / scale + _floor(native, oracle)


def scale_beside(oracle: Tensor, neighbours: float, off: float | None = None, machine_epsilon: float = 1.0) -> float:
    """Return the norm that errors of this tensor are relative to; if it is zero by cancellation, that of its terms.

    Args:
        oracle: the tensor.
        neighbours: the largest norm among tensors of its kind: that of the terms, if nothing else is known.
        off: norm of eager's own error, if it is known. It is small if the tensor is no cancellation, but only smaller
            than its neighbours; larger than the tensor, it shows the terms, which eager rounds.
        machine_epsilon: of eager's dtype.
    """
    own = scale_of(oracle)
    is_known = off is not None and off < _KNOWN * own
    if own < _CANCELLED * neighbours and not is_known:
        own = neighbours
    return (max(own, off / machine_epsilon) if off is not None and off > own else own) or 1.0


def _small_elements(native: Tensor, oracle: Tensor) -> Tensor | None:
    """Return where elements are, of which eager has the values, below a gap in magnitude; None without."""
    size = oracle.abs()
    is_value = torch.isfinite(size) & (size > 0)
    if native.dtype == oracle.dtype or not bool(is_value.any()):
        return None
    exponents = torch.frexp(size[is_value]).exponent
    occupied = torch.bincount(exponents - exponents.min()).nonzero().flatten()
    gaps = occupied.diff()
    if not len(gaps) or int(gaps.max()) <= _GAP:
        return None
    limit = 2.0 ** (int(occupied[gaps.argmax()]) + int(exponents.min()))
    small = is_value & (size <= limit)
    own, part = native[small], oracle[small]
    is_known = part.numel() >= _FEW_ELEMENTS and norm_of_difference(own, part) / scale_of(part) < _floor(own, part)
    return small if is_known else None


def scale_of(tensor: Tensor) -> float:
    """Return the norm of the finite elements, 0 for integers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    wide = _wide(tensor)
    found = norm(wide)
    return found if math.isfinite(found) else norm(torch.where(torch.isfinite(wide), wide, 0))


def largest_scale(tensors: Iterable[Tensor | None]) -> float:
    """Return the largest ``scale_of``, 0 without tensors: the ``neighbours`` of ``agreement``."""
    return max((scale_of(tensor) for tensor in tensors if tensor is not None), default=0.0)


def _floor(native: Tensor, oracle: Tensor) -> float:
    """Return the least tolerance: lower where a narrow dtype's epsilon is large and eager's own error is known."""
    machine_epsilon = torch.finfo(native.dtype).eps
    is_narrow = machine_epsilon > torch.finfo(torch.float32).eps
    is_known = oracle.dtype != native.dtype and native.numel() >= _FEW_ELEMENTS
    return (_NARROW_FLOOR_EPSILONS if is_narrow and is_known else _FLOOR_EPSILONS) * machine_epsilon


def norm_of_difference(left: Tensor, right: Tensor) -> float:
    """Return the norm of ``left - right`` over finite elements; infinite where NaN and Inf are not in the same places.

    Both are dense and of one shape; the difference is computed in float64.
    """
    left, right = _wide(left), _wide(right)
    distance = norm(left - right)
    if math.isfinite(distance):  # then each element is
        return distance
    finite = torch.isfinite(right)
    if not torch.equal(finite, torch.isfinite(left)):
        return math.inf
    if not torch.equal(torch.nan_to_num(left[~finite]), torch.nan_to_num(right[~finite])):
        return math.inf
    return norm((left - right)[finite])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
