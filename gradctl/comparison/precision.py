"""Rounding told from bias: whether the native error of a candidate averages out over random inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key
from gradctl.forms.form import Outcome
from gradctl.numerics.agreement import largest_scale, scale_beside

# A root mean square above it is not called a loss of precision, however it averages out.
_LARGEST = 1e-3
# The mean of n independent errors is rms / sqrt(n). A bias of the size of the rms is sqrt(n) times that.
_TIMES_ROUNDING = 2.0
# The share of bias in fewer elements is not known well enough: one of 8 inputs in 30 shows it by chance.
_FEW_ELEMENTS = 16


def relative_error_of(
    key: Key, oracle: Sequence[Outcome], candidate: Sequence[Outcome]
) -> tuple[Tensor, Tensor] | None:
    """Return the error of a tensor and its reference, relative to the reference's scale; None if either is missing.

    The error is missing, too, if the candidate has NaN or infinity in other places than the reference.

    Args:
        key: quantity and name of the tensor.
        oracle: the outcome of the reference in float64, or nothing.
        candidate: the outcome of the candidate in its own dtype, or nothing.
    """
    if not oracle or not candidate:
        return None
    references = tensors_of(oracle[0], key[0])
    reference, found = references.get(key[1]), tensors_of(candidate[0], key[0]).get(key[1])
    if reference is None or found is None or found.shape != reference.shape:
        return None
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(found)):
        return None
    scale = scale_beside(reference, largest_scale(references.values()))
    error = torch.where(finite, found.to(reference.dtype) - reference, 0)
    return error / scale, torch.where(finite, reference, 0) / scale


def rounding_error(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> float | None:
    """Return the root mean square of a candidate's relative error over some inputs; None if the error is no rounding.

    Rounding is independent of the input, so that its mean over n inputs falls as 1 / sqrt(n). A mean of twice that, of
    the errors or of their regression on the reference (a wrong factor), is a bias. Each slice along an axis whose error
    is above the average is tested alone, so that one wrong row does not hide in the rounding of the others.

    Args:
        pairs: error and reference on each input, of one shape, as ``relative_error_of`` returns them.
    """
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return None
    error, reference = (torch.stack(list(each)) for each in zip(*known, strict=True))
    n, axes = len(error), range(error.dim() - 1)
    energy = error.abs().square().sum(0)
    rms = math.sqrt(float(energy.sum()) / n)
    power = reference.abs().square().sum(0)
    products = (error * reference.conj()).sum(0).abs().square()
    biases = n * error.mean(0).abs().square(), torch.where(power > 0, products / power, 0)
    is_biased = any(_is_biased(energy, bias, kept, n) for bias in biases for kept in (None, *axes))
    return rms if 0 < rms < _LARGEST and not is_biased else None


def _is_biased(energy: Tensor, bias: Tensor, kept: int | None, n: int) -> bool:
    """Return whether a bias is most of the error over ``n`` inputs: as a whole, or in a slice along an axis."""
    summed = [axis for axis in range(energy.dim()) if axis != kept]
    total, part = (each.sum(summed) if summed else each for each in (energy, bias))
    if kept is not None and energy.numel() < _FEW_ELEMENTS * total.numel():
        return False
    return bool((part > _TIMES_ROUNDING**2 / n * total)[total >= total.mean()].any())


def bias_of(
    candidate: Sequence[tuple[Tensor, Tensor] | None], reference: Sequence[tuple[Tensor, Tensor] | None]
) -> float | None:
    """Return the relative size of a bias that neither noise nor the reference's own rounding explains; else None.

    Args:
        candidate: error and reference of the candidate on each input, as ``relative_error_of`` returns them.
        reference: the same of the reference's own native run.
    """
    return None
