"""Losses and their gradients, without the cancellation that torch's own decompositions have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
# How the operators are told "none" and "mean"; "sum" is 2.
_NONE, _MEAN = 0, 1


def _soft_margin_loss(self: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """Return log(1 + exp(-x t)), whose exponential does not overflow."""
    margin = -self * target
    return _reduced(margin.clamp_min(0) + torch.log1p(torch.exp(-margin.abs())), reduction)


def _soft_margin_loss_backward(grad_output: Tensor, self: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """Return -t sigmoid(-x t), the derivative of log(1 + exp(-x t)); torch has sigmoid(x t) - 1, which cancels.

    The sigmoid is written out: that of onnxruntime (1.32) has no digits left where it is small.
    """
    margin = -self * target
    small = torch.exp(-margin.abs())
    slope = -target * torch.where(margin < 0, small, 1) / (1 + small) * grad_output
    return slope / self.numel() if reduction == _MEAN else slope


def _multi_margin_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Tensor:
    """Return the derivative of sum over c != t of w[t] max(0, margin - x[t] + x[c])^p / C.

    Source: aten/src/ATen/native/LossMultiMargin.cpp.
    """
    rows, classes = (self if self.ndim == 2 else self.reshape(1, -1)), target.reshape(-1, 1)
    excess = margin - rows.gather(1, classes) + rows
    among = torch.arange(rows.shape[1], device=self.device)
    counted = (excess > 0) & (among != classes)
    slope = torch.ones_like(excess) if p == 1 else 2 * excess
    if weight is not None:
        slope = slope * weight[classes]
    slope = torch.where(counted, slope, 0)
    slope = slope - torch.where(among == classes, slope.sum(1, keepdim=True), 0)
    share = grad_output.reshape(-1, 1) / rows.shape[1]
    share = share / rows.shape[0] if reduction == _MEAN else share
    return (slope * share).reshape(self.shape)


def _multilabel_margin_loss_forward(self: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Return the sum over targets t and others c of max(0, 1 - x[t] + x[c]) / C, and which classes are targets.

    Targets are those before the first -1; torch's decomposition (2.13) adds a term for each place after it. Source:
    aten/src/ATen/native/LossMultiLabelMargin.cpp.
    """
    rows, labels = (each if each.ndim == 2 else each.reshape(1, -1) for each in (self, target))
    places, counts, among = _targets(rows, labels)
    is_target = ((places.unsqueeze(2) == among) & counts.unsqueeze(2)).any(1)
    excess = (1 - rows.gather(1, places).unsqueeze(2) + rows.unsqueeze(1)).clamp_min(0)
    counted = torch.where(counts.unsqueeze(2) & ~is_target.unsqueeze(1), excess, 0)
    loss = counted.sum((1, 2)) / rows.shape[1]
    whole = loss.reshape(self.shape[:-1])
    return _reduced(whole, reduction), is_target.to(self.dtype).reshape(self.shape)


def _multilabel_margin_loss_backward(
    grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    """Return the derivative of ``_multilabel_margin_loss_forward``, of the same source."""
    rows, labels = (each if each.ndim == 2 else each.reshape(1, -1) for each in (self, target))
    others = is_target.reshape(rows.shape) == 0
    places, counts, among = _targets(rows, labels)
    excess = 1 - rows.gather(1, places).unsqueeze(2) + rows.unsqueeze(1)
    active = ((excess > 0) & counts.unsqueeze(2) & others.unsqueeze(1)).to(rows.dtype)
    named = (places.unsqueeze(2) == among).to(rows.dtype)
    slope = active.sum(1) - (named * active.sum(2).unsqueeze(2)).sum(1)
    share = grad_output.reshape(-1, 1) / rows.shape[1]
    share = share / rows.shape[0] if reduction == _MEAN else share
    return (slope * share).reshape(self.shape)


def _targets(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels with a class for each -1, which of them count, and all classes."""
    among = torch.arange(rows.shape[1], device=rows.device)
    end = torch.where(labels < 0, among, rows.shape[1]).amin(1, keepdim=True)
    counts = among < end
    return torch.where(counts, labels, 0), counts, among


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return loss
    return loss.mean() if reduction == _MEAN else loss.sum()


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.multi_margin_loss_backward.default: _multi_margin_loss_backward,
    _aten.multilabel_margin_loss_forward.default: _multilabel_margin_loss_forward,
    _aten.multilabel_margin_loss_backward.default: _multilabel_margin_loss_backward,
    _aten.soft_margin_loss.default: _soft_margin_loss,
    _aten.soft_margin_loss_backward.default: _soft_margin_loss_backward,
}
