"""Attention three times: as written in the paper, fused with a backward of its own, and fused with a mistake.

``gradctl compare sample_models/attention.py:reference sample_models/attention.py:fused`` passes: the fused version
keeps no softmax, computes in blocks of keys, and recomputes the probabilities in its backward. ``:fused_wrong`` forgets
the scale in the gradient of the keys from the second block on: up to 16 keys it is right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BLOCK = 16  # keys


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale_of_keys: tuple[float, float]) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        largest = q.new_full((*q.shape[:-1], 1), -math.inf)
        total, output = torch.zeros_like(largest), torch.zeros_like(q)
        for keys, values in zip(k.split(_BLOCK, -2), v.split(_BLOCK, -2), strict=True):
            scores = scale * (q @ keys.transpose(-2, -1))
            new = torch.maximum(largest, scores.amax(-1, keepdim=True))
            weights, rescale = (scores - new).exp(), (largest - new).exp()
            total = rescale * total + weights.sum(-1, keepdim=True)
            output = rescale * output + weights @ values
            largest = new
        output = output / total
        ctx.save_for_backward(q, k, v, output, largest + total.log())
        ctx.scale_of_keys = scale_of_keys
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, log_total = ctx.saved_tensors
        scale, delta = 1 / math.sqrt(q.shape[-1]), (gradient * output).sum(-1, keepdim=True)
        of_q, of_k, of_v = torch.zeros_like(q), [], []
        for number, (keys, values) in enumerate(zip(k.split(_BLOCK, -2), v.split(_BLOCK, -2), strict=True)):
            weights = (scale * (q @ keys.transpose(-2, -1)) - log_total).exp()
            of_scores = weights * (gradient @ values.transpose(-2, -1) - delta)
            of_q += scale * of_scores @ keys
            of_k.append(scale * ctx.scale_of_keys[min(number, 1)] * of_scores.transpose(-2, -1) @ q)
            of_v.append(weights.transpose(-2, -1) @ gradient)
        return of_q, torch.cat(of_k, -2), torch.cat(of_v, -2), None


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Fused.apply(q, k, v, (1.0, 1.0))  # type: ignore[no-any-return,no-untyped-call]


def fused_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Fused.apply(q, k, v, (1.0, math.sqrt(q.shape[-1])))  # type: ignore[no-any-return,no-untyped-call]


def example_inputs(batch: int = 2, keys: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, length, 8, generator=generator) for length in (6, keys, keys))
    return q, k, v
