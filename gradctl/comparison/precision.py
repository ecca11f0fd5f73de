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


def relative_errors(oracle: Outcome, candidate: Outcome, key: Key) -> list[tuple[Tensor, Tensor]]:
    """Return the error of a tensor and its reference, both relative to the reference's scale; empty if it is missing.

    Args:
        oracle: the outcome of the reference in float64.
        candidate: the outcome of the candidate in its own dtype.
        key: quantity and name of the tensor.
    """
    references = tensors_of(oracle, key[0])
    reference, found = references.get(key[1]), tensors_of(candidate, key[0]).get(key[1])
    if reference is None or found is None or found.shape != reference.shape:
        return []
    scale = scale_beside(reference, largest_scale(references.values()))
    error = (found.to(reference.dtype) - reference) / scale
    finite = torch.isfinite(error)
    return [(torch.where(finite, error, 0), torch.where(finite, reference / scale, 0))]


def rounding_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return the root mean square of a candidate's relative error over some inputs; None if the error is a bias.

    Rounding is independent of the input, so that its mean over n inputs falls as 1 / sqrt(n). A mean of twice that, of
    the errors or of their regression on the reference (a wrong factor), is a bias. Each slice along an axis whose error
    is above the average is tested alone, so that one wrong row does not hide in the rounding of the others.

    Args:
        pairs: error and reference on each input, of one shape, as ``relative_errors`` returns them.
    """
    error, reference = (torch.stack(list(each)) for each in zip(*pairs, strict=True))
    n, axes = len(error), range(error.dim() - 1)
    energy = error.abs().square().sum(0)
    rms = math.sqrt(float(energy.sum()) / n)
    if not 0 < rms < _LARGEST:
        return None
    power = reference.abs().square().sum(0)
    products = (error * reference.conj()).sum(0).abs().square()
    biases = n * error.mean(0).abs().square(), torch.where(power > 0, products / power, 0)
    for kept in (None, *axes):
        summed = [axis for axis in axes if axis != kept]
        total, *parts = (each.sum(summed) if summed else each for each in (energy, *biases))
        is_known = kept is None or energy.numel() >= _FEW_ELEMENTS * total.numel()
        is_large = total >= total.mean()
        if is_known and any(bool((part > _TIMES_ROUNDING**2 / n * total)[is_large].any()) for part in parts):
            return None
    return rms
