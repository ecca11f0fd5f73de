"""Margin losses without the cancellation of torch's own decompositions, and the CTC loss.

The CTC loss and its gradient are the forward-backward algorithm in logarithms, one step of ONNX's Scan for each frame.
The number of frames may be symbolic, and lengths are values: for those that eager refuses (longer than their tensor)
the result is undefined. Eager's gradient is that by the input of a log_softmax before the loss, and so is this one.

Sources: Graves et al., Connectionist Temporal Classification, ICML 2006, section 4.1 and equation 16;
aten/src/ATen/native/LossCTC.cpp, LossMultiMargin.cpp and LossMultiLabelMargin.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import decomposes
from gradctl.subject.torch_private import DispatchKey, FakeTensorMode, deregister_op_impl, register_op_impl, scan

_aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # values of ``reduction``; sum is 2
_Lengths = Tensor | Sequence[int]


# torch decomposes it into log1p(exp(-x t)), whose exponential overflows.
@decomposes(_aten.soft_margin_loss.default)
def _soft_margin_loss(self: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    margin = -self * target
    return _reduced(margin.clamp_min(0) + torch.log1p(torch.exp(-margin.abs())), reduction)


# torch decomposes it into sigmoid(x t) - 1, which cancels.
@decomposes(_aten.soft_margin_loss_backward.default)
def _soft_margin_loss_backward(grad_output: Tensor, self: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """Return -t sigmoid(-x t), the derivative of log(1 + exp(-x t))."""
    margin = -self * target
    # The sigmoid of onnxruntime (1.32) has no correct digits left if it is small.
    small = torch.exp(-margin.abs())
    slope = -target * torch.where(margin < 0, small, 1) / (1 + small) * grad_output
    return slope / self.numel() if reduction == _MEAN else slope


@decomposes(_aten.multi_margin_loss_backward.default)
def _multi_margin_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Tensor:
    """Return the derivative of sum over c != t of w[t] max(0, margin - x[t] + x[c])^p / C."""
    rows, classes = (self if self.ndim == 2 else self.reshape(1, -1)), target.reshape(-1, 1)
    excess = margin - rows.gather(1, classes) + rows
    is_target = _along(rows) == classes
    slope = torch.ones_like(excess) if p == 1 else 2 * excess
    if weight is not None:
        slope = slope * weight[classes]
    slope = torch.where((excess > 0) & ~is_target, slope, 0)
    slope = slope - torch.where(is_target, slope.sum(1, keepdim=True), 0)
    return _times_grad(slope, grad_output, reduction).reshape(self.shape)


# Targets end at the first -1; torch's decomposition (2.13) adds a term for each place after it.
@decomposes(_aten.multilabel_margin_loss_forward.default)
def _multilabel_margin_loss(self: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Return the sum over targets t and others c of max(0, 1 - x[t] + x[c]) / C, and which classes are targets."""
    rows, places, counts, excess = _margins(self, target)
    is_target = ((places.unsqueeze(2) == _along(rows)) & counts.unsqueeze(2)).any(1)
    counted = torch.where(counts.unsqueeze(2) & ~is_target.unsqueeze(1), excess.clamp_min(0), 0)
    loss = (counted.sum((1, 2)) / rows.shape[1]).reshape(self.shape[:-1])
    return _reduced(loss, reduction), is_target.to(self.dtype).reshape(self.shape)


@decomposes(_aten.multilabel_margin_loss_backward.default)
def _multilabel_margin_loss_backward(
    grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    rows, places, counts, excess = _margins(self, target)
    others = is_target.reshape(rows.shape) == 0
    active = ((excess > 0) & counts.unsqueeze(2) & others.unsqueeze(1)).to(rows.dtype)
    named = (places.unsqueeze(2) == _along(rows)).to(rows.dtype)
    slope = active.sum(1) - (named * active.sum(2).unsqueeze(2)).sum(1)
    return _times_grad(slope, grad_output, reduction).reshape(self.shape)


def _margins(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, targets with a class for each -1, which of these count, and 1 - x[target] + x[class]."""
    rows, labels = (each if each.ndim == 2 else each.reshape(1, -1) for each in (x, target))
    classes = _along(rows)
    counts = classes < torch.where(labels < 0, classes, rows.shape[1]).amin(1, keepdim=True)
    places = torch.where(counts, labels, 0)
    return rows, places, counts, 1 - rows.gather(1, places).unsqueeze(2) + rows.unsqueeze(1)


def _times_grad(slope: Tensor, grad_output: Tensor, reduction: int) -> Tensor:
    """Return the gradient by rows, from that by a loss which is divided by the number of classes."""
    share = grad_output.reshape(-1, 1) / slope.shape[1]
    return slope * (share / slope.shape[0] if reduction == _MEAN else share)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return loss
    return loss.mean() if reduction == _MEAN else loss.sum()


class _States(NamedTuple):
    """A target with blanks before, between and after its labels, as states of an automaton."""

    labels: Tensor  # the class of each state, ``[batch, states]``; blank after the end of the target
    skips: Tensor  # whether a state follows the one two before it: it is not blank, and another label
    ends: Tensor  # whether a path may end there
    log_probs: Tensor  # of the class of each state, ``[time, batch, states]``
    frames: Tensor  # the number of frames of each sequence, ``[batch]``


@decomposes(_aten._ctc_loss.default, _aten._ctc_loss.Tensor)
def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: _Lengths,
    target_lengths: _Lengths,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[batch]`` and the logarithms of alpha ``[batch, time, states]``.

    From probabilities ``[time, batch, class]``, targets ``[batch, length]`` or in one row, and lengths ``[batch]``.
    """
    states = _states(log_probs, targets, input_lengths, target_lengths, blank)
    lowest = torch.full_like(states.log_probs[0], -math.inf)
    # A path that has emitted nothing is before the first blank, and the first label.
    before = torch.where(_along(states.labels) == 0, 0, lowest)

    def step(alpha: Tensor, emitted: Tensor, skips: Tensor) -> list[Tensor]:
        one, two = _shifted(alpha, 1), torch.where(skips, _shifted(alpha, 2), -math.inf)
        following = _log_sum(alpha, one, two) + emitted
        return [following, following.clone()]

    alphas: Tensor = scan(step, [before], [states.log_probs], (states.skips,))[1]
    last = (states.frames - 1).clamp_min(0).reshape(1, -1, 1).expand(1, *states.labels.shape)
    final = torch.where(states.ends, alphas.gather(0, last).squeeze(0), -math.inf)
    largest = final.amax(1, keepdim=True).clamp_min(torch.finfo(final.dtype).min)
    losses = -((final - largest).exp().sum(1).log() + largest.squeeze(1))
    # A path without frames is that without labels, which ends in the first state.
    without = torch.where(states.ends[:, 0], 0, math.inf)
    return torch.where(states.frames == 0, without, losses), alphas.transpose(0, 1)


@decomposes(_aten._ctc_loss_backward.default, _aten._ctc_loss_backward.Tensor)
def _ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: _Lengths,
    target_lengths: _Lengths,
    neg_log_likelihood: Tensor,
    log_alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    """Return the gradient ``[time, batch, class]``: probabilities, less those of the paths through each class."""
    states = _states(log_probs, targets, input_lengths, target_lengths, blank)
    lowest = torch.full_like(states.log_probs[0], -math.inf)
    final = torch.where(states.ends, 0, lowest)
    frames = torch.arange(log_probs.shape[0], device=log_probs.device)
    last = (states.frames - 1).reshape(-1, 1)
    # Whether a state is followed by the one two after it.
    skipped = _shifted(states.skips.to(log_probs.dtype), -2, 0) != 0

    def step(
        after: Tensor, emitted: Tensor, frame: Tensor, last: Tensor, final: Tensor, skipped: Tensor
    ) -> list[Tensor]:
        one, two = _shifted(after, -1), torch.where(skipped, _shifted(after, -2), -math.inf)
        beta = torch.where(last == frame, final, _log_sum(after, one, two))
        return [beta + emitted, beta]

    given = [states.log_probs.flip(0), frames.flip(0)]
    betas: Tensor = scan(step, [lowest], given, (last, final, skipped))[1].flip(0)
    loss = neg_log_likelihood.reshape(-1, 1)
    passing = (log_alpha.transpose(0, 1) + betas + loss).exp()
    occupied = _aten.scatter_add(torch.zeros_like(log_probs), 2, states.labels.expand(passing.shape), passing)
    # 0, or NaN as in eager: there is no path, or a probability is 0.
    nothing = (loss - log_probs - math.inf).exp()
    slope = (log_probs.exp() - occupied - nothing) * grad.reshape(-1, 1)
    counts = frames.reshape(-1, 1) < states.frames
    if zero_infinity:
        counts = counts & (neg_log_likelihood != math.inf)
    return torch.where(counts.unsqueeze(2), slope, 0)


def _states(
    log_probs: Tensor, targets: Tensor, input_lengths: _Lengths, target_lengths: _Lengths, blank: int
) -> _States:
    frames, lengths = (
        (each if isinstance(each, Tensor) else torch.tensor(list(each))).to(log_probs.device, torch.int64).reshape(-1)
        for each in (input_lengths, target_lengths)
    )
    longest = None if isinstance(target_lengths, Tensor) else max(target_lengths)
    targets = _padded_targets(targets.to(torch.int64), lengths, longest, blank)
    between = torch.stack([torch.full_like(targets, blank), targets], 2).flatten(1)
    labels = torch.cat([between, torch.full_like(lengths.unsqueeze(1), blank)], 1)
    skips = labels != _shifted(labels, 2, blank)
    ends = (_along(labels) - 2 * lengths.unsqueeze(1)).to(torch.int64)
    emitted = log_probs.gather(2, labels.expand(log_probs.shape[0], *labels.shape))
    return _States(labels, skips, (ends == 0) | (ends == -1), emitted, frames)


def _padded_targets(targets: Tensor, lengths: Tensor, longest: int | None, blank: int) -> Tensor:
    """Return targets ``[batch, length]``, blank after the end of each: the given padding may not be a class."""
    if targets.ndim == 1:
        # If lengths are values, each may be that of the whole row.
        count = targets.shape[0] if longest is None else longest
        places = torch.arange(count, device=targets.device) + (lengths.cumsum(0) - lengths).unsqueeze(1)
        targets = targets[places.clamp_max(targets.shape[0] - 1)] if count else targets.new_zeros(lengths.shape[0], 0)
    return torch.where(_along(targets) < lengths.unsqueeze(1), targets, blank)


def _along(rows: Tensor) -> Tensor:
    """Return the indices of the second axis."""
    return torch.arange(rows.shape[1], device=rows.device)


def _shifted(rows: Tensor, count: int, fill: float = -math.inf) -> Tensor:
    """Return rows moved by ``count`` places to the right; to the left, if it is negative."""
    width, padding = rows.shape[1], (count, 0) if count > 0 else (0, -count)
    return torch.constant_pad_nd(rows, padding, fill).narrow(1, max(-count, 0), width)


def _log_sum(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Return the logarithm of the sum of three exponentials; -inf if all three are."""
    # Clamped, because the difference of two infinities is NaN.
    largest = torch.maximum(first, torch.maximum(second, third)).clamp_min(torch.finfo(first.dtype).min)
    total = (first - largest).exp() + (second - largest).exp() + (third - largest).exp()
    return total.log() + largest


@contextmanager
def fake_ctc_loss() -> Iterator[None]:
    """Let torch run the CTC loss and its gradient on fake tensors.

    For torch the size of alpha, an inner value, is unknown, and it cannot make a tensor of lengths that are integers.
    """

    def fake_loss(mode: FakeTensorMode, func: Any, log_probs: Tensor, targets: Tensor, *others: Any) -> Any:
        time, batch, _ = log_probs.shape
        return log_probs.new_empty(batch), log_probs.new_empty(batch, time, 2 * targets.shape[-1] + 1)

    def fake_gradient(mode: FakeTensorMode, func: Any, grad: Tensor, log_probs: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(log_probs)

    def loss_of_integers(log_probs: Tensor, targets: Tensor, frames: Any, lengths: Any, *others: Any) -> Any:
        return _aten.ctc_loss.Tensor(log_probs, targets, torch.tensor(frames), torch.tensor(lengths), *others)

    rules: dict[Any, Callable[..., Any]] = {
        _aten._ctc_loss.default: fake_loss,
        _aten._ctc_loss.Tensor: fake_loss,
        _aten._ctc_loss_backward.default: fake_gradient,
        _aten._ctc_loss_backward.Tensor: fake_gradient,
    }
    for operator, rule in rules.items():
        register_op_impl(operator)(rule)
    composite, key = _aten.ctc_loss.IntList, DispatchKey.CompositeImplicitAutograd
    composite.py_impl(key)(loss_of_integers)
    try:
        yield
    finally:
        del composite.py_kernels[key]
        composite._dispatch_cache.clear()
        for operator in rules:
            deregister_op_impl(operator)
