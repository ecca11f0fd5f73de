"""The CTC loss and its gradient: the forward-backward algorithm in logarithms, a step of ONNX's Scan for each frame.

The number of frames may be free, and lengths are values: those that eager refuses (longer than what is there) give
numbers without a meaning. Eager's gradient is that by the input of a log_softmax before the loss, which is taken here.

Private to torch: ``torch._C.DispatchKey``, ``torch._higher_order_ops.scan``, ``torch._subclasses.fake_impls``.

Sources: Graves et al., Connectionist Temporal Classification, ICML 2006, section 4.1 and equation 16;
aten/src/ATen/native/LossCTC.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_impls import _deregister_op_impl, register_op_impl
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["TABLE", "without_data"]

_aten = torch.ops.aten
_Lengths = Tensor | Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class _States:
    """A target with blanks before, between and after its labels, as states of an automaton.

    Attributes:
        labels: what each state emits, ``[batch, states]``; blank where the target has ended.
        skips: whether a state follows the one two before it: it is no blank, and another label.
        ends: whether a path may end there.
        log_probs: of what each state emits, ``[time, batch, states]``.
        frames: the number of them in each sequence, ``[batch]``.
    """

    labels: Tensor
    skips: Tensor
    ends: Tensor
    log_probs: Tensor
    frames: Tensor


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: _Lengths,
    target_lengths: _Lengths,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the losses ``[batch]`` and the logarithms of alpha ``[batch, time, states]``.

    Args:
        log_probs: ``[time, batch, class]``.
        targets: ``[batch, length]``, or all of them in one row.
        input_lengths, target_lengths: ``[batch]``.
        blank: its class.
        zero_infinity: of the gradient alone.
    """
    states = _states(log_probs, targets, input_lengths, target_lengths, blank)
    lowest = torch.full_like(states.log_probs[0], -math.inf)
    # A path that has emitted nothing is before the first blank, and the first label.
    before = torch.where(_along(states.labels) == 0, 0, lowest)

    def step(alpha: Tensor, emitted: Tensor, skips: Tensor) -> list[Tensor]:
        one, two = _shifted(alpha, 1), torch.where(skips, _shifted(alpha, 2), -math.inf)
        following = _log_sum(alpha, one, two) + emitted
        return [following, following.clone()]

    alphas: Tensor = scan_op(step, [before], [states.log_probs], (states.skips,))[1]
    last = (states.frames - 1).clamp_min(0).reshape(1, -1, 1).expand(1, *states.labels.shape)
    final = torch.where(states.ends, alphas.gather(0, last).squeeze(0), -math.inf)
    largest = final.amax(1, keepdim=True).clamp_min(torch.finfo(final.dtype).min)
    losses = -((final - largest).exp().sum(1).log() + largest.squeeze(1))
    # A path of no frames is that of no labels, which ends in the first state.
    without = torch.where(states.ends[:, 0], 0, math.inf)
    return torch.where(states.frames == 0, without, losses), alphas.transpose(0, 1)


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
    """Return the gradient ``[time, batch, class]``: what is emitted with what probability, less that of its paths."""
    states = _states(log_probs, targets, input_lengths, target_lengths, blank)
    lowest = torch.full_like(states.log_probs[0], -math.inf)
    final = torch.where(states.ends, 0, lowest)
    frames = torch.arange(log_probs.shape[0], device=log_probs.device).flip(0)
    last = (states.frames - 1).reshape(-1, 1)
    # Whether a state is followed by the one two after it.
    skipped = _shifted(states.skips.to(log_probs.dtype), -2, 0) != 0

    def step(
        after: Tensor, emitted: Tensor, frame: Tensor, last: Tensor, final: Tensor, skipped: Tensor
    ) -> list[Tensor]:
        one, two = _shifted(after, -1), torch.where(skipped, _shifted(after, -2), -math.inf)
        beta = torch.where(last == frame, final, _log_sum(after, one, two))
        return [beta + emitted, beta]

    betas: Tensor = scan_op(step, [lowest], [states.log_probs.flip(0), frames], (last, final, skipped))[1].flip(0)
    loss = neg_log_likelihood.reshape(-1, 1)
    passing = (log_alpha.transpose(0, 1) + betas + loss).exp()
    among = states.labels.expand(passing.shape)
    occupied = _aten.scatter_add(torch.zeros_like(log_probs), 2, among, passing)
    # 0, or NaN where eager has it: no path at all, or a probability of 0.
    nothing = (loss - log_probs - math.inf).exp()
    slope = (log_probs.exp() - occupied - nothing) * grad.reshape(-1, 1)
    counts = torch.arange(log_probs.shape[0], device=log_probs.device).reshape(-1, 1) < states.frames
    if zero_infinity:
        counts = counts & (neg_log_likelihood != math.inf)
    return torch.where(counts.unsqueeze(2), slope, 0)


def _states(
    log_probs: Tensor, targets: Tensor, input_lengths: _Lengths, target_lengths: _Lengths, blank: int
) -> _States:
    frames, lengths = _tensor(input_lengths, log_probs), _tensor(target_lengths, log_probs)
    longest = None if isinstance(target_lengths, Tensor) else max(target_lengths)
    targets = _padded(targets.to(torch.int64), lengths, longest, blank)
    blanks = torch.full_like(targets, blank)
    between = torch.stack([blanks, targets], 2).flatten(1)
    labels = torch.cat([between, torch.full_like(lengths.unsqueeze(1), blank)], 1)
    skips = labels != _shifted(labels, 2, blank)
    ends = (_along(labels) - 2 * lengths.unsqueeze(1)).to(torch.int64)
    emitted = log_probs.gather(2, labels.expand(log_probs.shape[0], *labels.shape))
    return _States(labels, skips, (ends == 0) | (ends == -1), emitted, frames)


def _padded(targets: Tensor, lengths: Tensor, longest: int | None, blank: int) -> Tensor:
    """Return targets ``[batch, length]``, blank where one has ended: what is there may be no class."""
    if targets.ndim == 1:
        # Lengths that are values: each may be that of the whole row.
        count = targets.shape[0] if longest is None else longest
        places = torch.arange(count, device=targets.device) + (lengths.cumsum(0) - lengths).unsqueeze(1)
        targets = targets[places.clamp_max(targets.shape[0] - 1)] if count else targets.new_zeros(lengths.shape[0], 0)
    return torch.where(_along(targets) < lengths.unsqueeze(1), targets, blank)


def _tensor(lengths: _Lengths, like: Tensor) -> Tensor:
    found = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
    return found.to(like.device, torch.int64).reshape(-1)


def _along(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device)


def _shifted(rows: Tensor, count: int, fill: float = -math.inf) -> Tensor:
    """Return rows moved by ``count`` places to the right, or to the left."""
    width, padding = rows.shape[1], (count, 0) if count > 0 else (0, -count)
    return torch.constant_pad_nd(rows, padding, fill).narrow(1, max(-count, 0), width)


def _log_sum(*terms: Tensor) -> Tensor:
    """Return the logarithm of the sum of exponentials, -inf of three of these."""
    first, second, third = terms
    # Finite, where all are -inf: their difference would be NaN.
    largest = torch.maximum(first, torch.maximum(second, third)).clamp_min(torch.finfo(first.dtype).min)
    total = (first - largest).exp() + (second - largest).exp() + (third - largest).exp()
    return total.log() + largest


@contextmanager
def without_data() -> Iterator[None]:
    """Let torch run the loss and its gradient without data.

    It takes the size of alpha, an inner value, for unknown, and cannot make a tensor of lengths that are integers.
    """

    def of_loss(mode: FakeTensorMode, func: Any, log_probs: Tensor, targets: Tensor, *others: Any) -> Any:
        time, batch, _ = log_probs.shape
        return log_probs.new_empty(batch), log_probs.new_empty(batch, time, 2 * targets.shape[-1] + 1)

    def of_gradient(mode: FakeTensorMode, func: Any, grad: Tensor, log_probs: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(log_probs)

    def of_integers(log_probs: Tensor, targets: Tensor, frames: Any, lengths: Any, *others: Any) -> Any:
        return _aten.ctc_loss.Tensor(log_probs, targets, torch.tensor(frames), torch.tensor(lengths), *others)

    rules = {each: of_gradient if "backward" in each.name() else of_loss for each in TABLE}
    for operator, rule in rules.items():
        register_op_impl(operator)(rule)
    composite, key = _aten.ctc_loss.IntList, DispatchKey.CompositeImplicitAutograd
    composite.py_impl(key)(of_integers)
    try:
        yield
    finally:
        del composite.py_kernels[key]
        composite._dispatch_cache.clear()
        for operator in rules:
            _deregister_op_impl(operator)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._ctc_loss.default: _ctc_loss,
    _aten._ctc_loss.Tensor: _ctc_loss,
    _aten._ctc_loss_backward.default: _ctc_loss_backward,
    _aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
}
