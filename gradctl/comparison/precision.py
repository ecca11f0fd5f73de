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
from gradctl.numerics.measures import is_float, norm

# A root mean square above it is not called a loss of precision, however it averages out.
_LARGEST = 1e-3
# The mean of n independent errors is rms / sqrt(n). A bias of the size of the rms is sqrt(n) times that.
_TIMES_ROUNDING = 2.0
# The share of bias in fewer elements is not known well enough: one of 8 inputs in 30 shows it by chance.
_FEW_ELEMENTS = 16
# The statistics of eight inputs take some 400 bytes and 4 µs for each element.
_MOST_ELEMENTS = 2**16
_NARROW = (torch.float16, torch.bfloat16)
# Right kernels (tests/benchmarks/kernel_corpus.py) have in these, over 8 inputs, at most 1.6 times the reference's own
# error; on a single input 2.3 times.
_TIMES_OWN, _FLOOR_EPSILONS = 4.0, 0.5
# The norm of fewer elements can be right by luck in the reference.
_FEWEST = 8
# The root mean square of an error of one rounding to nearest, in epsilons, relative to the root mean square.
_ROUNDED_ONCE = 0.2
# A bias in standard deviations. With 8 inputs, Student's t exceeds 10 with a chance of 2e-5.
_SIGNIFICANT = 10.0
# A bias in root mean squares of the reference's own rounding. Right kernels (tests/benchmarks/kernel_corpus.py) have at
# most 0.2 (0.9 in a tensor of 8 elements, where it is not significant); rounding towards zero has 1.2 to 1.7.
_SHARE_OF_ROUNDING = 0.5
# A wrong factor in a slice or an element, in the largest that the reference's rounding shows; right ones: at most 7.4.
_TIMES_LOCAL = 16.0
# A slice with so small a share of the average energy has no factor that rounding leaves known.
_SHARE_OF_ENERGY = 0.1
# Below it, a constant that was rounded to float32 is enough.
_LEAST_BIAS = 1e-5
# The squared norm of a tensor relative to its neighbours: below it, the tensor is rounding itself, and has no factor.
_CANCELLED = 1e-6


def relative_error_of(
    key: Key, oracle: Sequence[Outcome], candidate: Sequence[Outcome]
) -> tuple[Tensor, Tensor] | None:
    """Return the error of a tensor and its reference, relative to the reference's scale; None if either is missing.

    The error is missing, too, if the candidate has NaN or infinity in other places than the reference, or integers. Of
    a large tensor both are a sample of its slices.

    Args:
        key: quantity and name of the tensor.
        oracle: the outcome of the reference in float64, or nothing.
        candidate: the outcome of the candidate in its own dtype, or nothing.
    """
    if not oracle or not candidate:
        return None
    references = tensors_of(oracle[0], key[0])
    reference, found = references.get(key[1]), tensors_of(candidate[0], key[0]).get(key[1])
    if reference is None or found is None or found.shape != reference.shape or not is_float(reference):
        return None
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(found)):
        return None
    scale = scale_beside(reference, largest_scale(references.values()))
    error = torch.where(finite, found.to(reference.dtype) - reference, 0)
    return _thinned(error) / scale, _thinned(torch.where(finite, reference, 0)) / scale


def _thinned(tensor: Tensor) -> Tensor:
    """Return every third slice along the longest axis until few elements are left, scaled to the norm of all."""
    thinned = tensor
    while thinned.numel() > _MOST_ELEMENTS:
        axis = max(range(thinned.dim()), key=thinned.size)
        thinned = thinned[(*[slice(None)] * axis, slice(None, None, 3))]
    return thinned * math.sqrt(tensor.numel() / thinned.numel()) if thinned is not tensor else tensor


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
    candidate: Sequence[tuple[Tensor, Tensor] | None],
    reference: Sequence[tuple[Tensor, Tensor] | None],
    dtype: torch.dtype,
) -> float | None:
    """Return the relative size of a bias that rounding does not explain, the reference's own included; None without.

    Three kinds of bias are looked for: a wrong factor (regression of the error on the reference) of the whole tensor; a
    much larger one of a slice along an axis, or of one element; and a mean error of each element. Each must be
    significant against the scatter over elements and inputs, and be large beside what the reference shows by the same
    statistic. A bias that depends on the inputs in another way cannot be told from rounding.

    Args:
        candidate: error and reference on each random input, of one shape, as ``relative_error_of`` returns them.
        reference: the same of the reference's own native run.
        dtype: of the tensor; a reference that is exact is taken to round its result once.

    Returns:
        The norm of the bias, relative to the norm of the reference.
    """
    pairs, own = ([pair for pair in each if pair is not None] for each in (candidate, reference))
    if len(pairs) < len(candidate) or len(own) < len(pairs) or len(pairs) < 2:
        return None
    error, true = (torch.stack([_as_real(each) for each in parts]) for parts in zip(*pairs, strict=True))
    rounding = torch.stack([_as_real(each) for each, _ in own])
    axes, once = range(1, error.dim()), _ROUNDED_ONCE * torch.finfo(dtype).eps
    found = [_persistent(error, rounding, once)]
    if float(true.square().sum()) > _CANCELLED * len(true):
        local = {(axis,) for axis in axes} | {tuple(axes)}
        found += [_wrong_factor(error, rounding, true, kept, once) for kept in [(), *sorted(local)]]
    return max(found) if max(found) > _LEAST_BIAS else None


def lost_precision(
    candidate: Sequence[tuple[Tensor, Tensor] | None],
    reference: Sequence[tuple[Tensor, Tensor] | None],
    dtype: torch.dtype,
) -> float | None:
    """Return the root mean square of a candidate's relative error, in a narrow dtype, if right kernels lose less.

    On a single input the tolerance has a floor of some epsilons, which hides a sum in bfloat16 or float16; over several
    inputs the reference's own error is known well enough to do without.

    Args:
        candidate, reference: as in ``bias_of``.
        dtype: of the tensor.
    """
    errors, own = ([pair[0] for pair in each if pair is not None] for each in (candidate, reference))
    if dtype not in _NARROW or not errors or errors[0].numel() < _FEWEST or len(errors) != len(own):
        return None
    found, least = (math.hypot(*map(norm, part)) / math.sqrt(len(part)) for part in (errors, own))
    return found if found > _TIMES_OWN * least + _FLOOR_EPSILONS * torch.finfo(dtype).eps else None


def _wrong_factor(error: Tensor, rounding: Tensor, reference: Tensor, kept: tuple[int, ...], once: float) -> float:
    """Return the relative size of a wrong factor: of the whole, or of the slices along some axes; 0 without."""
    factor, deviation = _regression(error, reference, kept)
    own, own_deviation = _regression(rounding, reference, kept)
    energy = _summed(reference.square(), kept)
    known = energy >= _SHARE_OF_ENERGY * energy.mean()
    if kept:
        limit = _TIMES_LOCAL * max(float((own.abs() + own_deviation)[known].max()), once)
    else:
        size = math.sqrt(float(rounding.square().sum() / energy))
        limit = _SHARE_OF_ROUNDING * max(size, once) + 2 * float(own.abs())
    is_wrong = known & (factor.abs() > limit) & (factor.abs() > _SIGNIFICANT * deviation)
    return math.sqrt(float((factor.square() * energy)[is_wrong].sum() / energy.sum()))


def _regression(error: Tensor, reference: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the factor by which an error follows the reference, and its standard deviation, for each slice.

    The deviation is the larger of two estimates: from the scatter of the elements, which may depend on each other (one
    rounded statistic of a row), and from that of the inputs, which are few.
    """
    energy = _summed(reference.square(), kept).clamp(min=torch.finfo(reference.dtype).tiny)
    factor = _summed(error * reference, kept) / energy
    shape = [size if axis in kept else 1 for axis, size in enumerate(error.shape)]
    scatter = (error - factor.reshape(shape) * reference) * reference
    n = len(error)
    by_input = _summed(scatter, (0, *kept)).square().sum(0) * n / (n - 1)
    return factor, torch.maximum(_summed(scatter.square(), kept), by_input).sqrt() / energy


def _persistent(error: Tensor, rounding: Tensor, once: float) -> float:
    """Return the norm of the elements' mean error over the inputs, less what independent errors leave; 0 without."""
    size, is_significant = _common_part(error)
    own, _ = _common_part(rounding)
    # What depends on the parameters alone is rounded in the same way on each input.
    limit = _SHARE_OF_ROUNDING * math.sqrt(float(rounding.square().sum()) / len(rounding)) + 2 * max(own, once)
    return size if is_significant and size > limit else 0.0


def _common_part(error: Tensor) -> tuple[float, bool]:
    """Return the norm of what the errors on all inputs have in common, and whether it is significant."""
    flat = error.reshape(len(error), -1)
    products = (flat @ flat.mT)[~torch.eye(len(flat), dtype=torch.bool, device=flat.device)]
    mean = float(products.mean())
    deviation = float(products.std()) / math.sqrt(len(products) / 2)
    return math.sqrt(max(mean, 0.0)), mean > _SIGNIFICANT * deviation


def _summed(tensor: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Return the sums over all axes but some."""
    axes = [axis for axis in range(tensor.dim()) if axis not in kept]
    return tensor.sum(axes) if axes else tensor


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
