"""Attention: softmax(scale * q k' + bias) v with masks, dropout, groups and windows, beside blockwise kernels."""

from __future__ import annotations

import math
from functools import partial

import torch

from tests.kernels.pairs import Pair, Wrong, kernel, wide

BLOCK = 8
WINDOW = 5
CAP = 2.0
KEPT = 0.75


# Blockwise attention, the one algorithm of all kernels below.
def flash(q, k, v, allowed, bias, scale, *, skip_rest=False):
    """Return output and log-sum-exp of each row by online softmax over blocks of keys."""
    q, k, v = wide(q), wide(k), wide(v)
    best = q.new_full((*q.shape[:-1], 1), -math.inf)
    total, out = torch.zeros_like(best), torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    length = k.shape[-2]
    for start in range(0, length // BLOCK * BLOCK if skip_rest else length, BLOCK):
        part = slice(start, start + BLOCK)
        scores = q @ k[..., part, :].mT * scale
        scores = scores if bias is None else scores + bias[..., part]
        scores = scores if allowed is None else scores.masked_fill(~allowed[..., part], -math.inf)
        new = torch.maximum(best, scores.amax(-1, keepdim=True))
        safe = torch.where(new == -math.inf, 0, new)
        weights, decay = (scores - safe).exp(), (best - safe).exp()
        total, out = total * decay + weights.sum(-1, keepdim=True), out * decay + weights @ v[..., part, :]
        best = new
    empty = total == 0
    lse = torch.where(empty, math.inf, best + total.log())
    return out / torch.where(empty, 1, total), lse


def flash_backward(q, k, v, out, lse, g, allowed, bias, scale, *, dk_scale=None, keep=None):
    """Return the gradients of q, k and v from the saved log-sum-exp, in the accumulation dtype."""
    dtype, (q, k, v, out, g) = q.dtype, map(wide, (q, k, v, out, g))
    scores = q @ k.mT * scale
    scores = scores if bias is None else scores + bias
    p = (scores - lse).exp()
    p = p if allowed is None else p.masked_fill(~allowed, 0)
    dropped = p if keep is None else p * keep
    dp = g @ v.mT
    dp = dp if keep is None else dp * keep
    ds = p * (dp - (g * out).sum(-1, keepdim=True))
    dk = ds.mT @ q * (scale if dk_scale is None else dk_scale)
    return (ds @ k * scale).to(dtype), dk.to(dtype), (dropped.mT @ g).to(dtype)


def causal(length, window=None):
    """Return which key each query may see."""
    gap = torch.arange(length)[:, None] - torch.arange(length)
    return (gap >= 0) & (gap < (window or length))


def qkv(generator, batch=2, length=20, heads=2, kv_heads=None, width=16):
    shapes = (heads, kv_heads or heads, kv_heads or heads)
    return tuple(torch.randn(batch, h, length, width, generator=generator) for h in shapes)


# Plain attention
def attention(q, k, v):
    return ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _attention_forward(q, k, v, scale=None, skip_rest=False):
    out, lse = flash(q, k, v, None, None, scale or q.shape[-1] ** -0.5, skip_rest=skip_rest)
    return out.to(q.dtype), [q, k, v, out, lse]


def _attention_backward(saved, g, scale=None, dk_scale=None):
    q, k, v, out, lse = saved
    return flash_backward(q, k, v, out, lse, g, None, None, scale or q.shape[-1] ** -0.5, dk_scale=dk_scale)


PLAIN = Pair(
    attention,
    kernel(_attention_forward, _attention_backward),
    qkv,
    {
        "no scale in dK": Wrong(kernel(_attention_forward, partial(_attention_backward, dk_scale=1.0)), "input:k"),
        "scale 1/d": Wrong(
            kernel(partial(_attention_forward, scale=1 / 16), partial(_attention_backward, scale=1 / 16)),
            "output input:q input:k input:v",
        ),
        "rest of the keys left out": Wrong(
            kernel(partial(_attention_forward, skip_rest=True), _attention_backward),
            "output input:q input:k input:v",
            hidden_at={"length": 16},
        ),
    },
)


# Causal with padding: rows whose keys are all padding give 0
def masked_attention(q, k, v, padding):
    seen = causal(q.shape[-2]) & ~padding[:, None, None, :]
    scores = ((q @ k.mT) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).masked_fill(~seen, 0) @ v


def _padded(generator, batch=2, length=20, padded=3):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, :padded] = True  # on the left, so that the first rows see nothing
    return *qkv(generator, batch, length), padding


def _masked_forward(q, k, v, padding):
    seen = causal(q.shape[-2]) & ~padding[:, None, None, :]
    out, lse = flash(q, k, v, seen, None, q.shape[-1] ** -0.5)
    return out.to(q.dtype), [q, k, v, out, lse, seen]


def _masked_backward(saved, g, later_keys=False):
    q, k, v, out, lse, seen = saved
    allowed = seen.any(-2, keepdim=True).expand_as(seen) if later_keys else seen
    return *flash_backward(q, k, v, out, lse, g, allowed, None, q.shape[-1] ** -0.5), None


def mask_after_softmax(q, k, v, padding):
    seen = causal(q.shape[-2]) & ~padding[:, None, None, :]
    return ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1).masked_fill(~seen, 0) @ v


def nan_on_masked_rows(q, k, v, padding):
    seen = causal(q.shape[-2]) & ~padding[:, None, None, :]
    return ((q @ k.mT) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf).softmax(-1) @ v


MASKED = Pair(
    masked_attention,
    kernel(_masked_forward, _masked_backward),
    _padded,
    {
        "mask after softmax": Wrong(mask_after_softmax, "output input:q input:k input:v"),
        "NaN on masked rows": Wrong(
            nan_on_masked_rows,
            "output input:v",
            hidden_at={"padded": 0},
            source="pytorch 41508",
        ),
        "no causal mask in backward": Wrong(
            kernel(_masked_forward, partial(_masked_backward, later_keys=True)),
            "input:q input:k input:v",
            source="MSLK 263",
        ),
    },
)


# Dropout with a given mask
def dropped_attention(q, k, v, keep):
    weights = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights * keep / KEPT) @ v


def _dropout_inputs(generator, batch=2, length=20):
    return *qkv(generator, batch, length), torch.rand(batch, 2, length, length, generator=generator) < KEPT


def _dropped_forward(q, k, v, keep):
    _, lse = flash(q, k, v, None, None, q.shape[-1] ** -0.5)
    p = (wide(q) @ wide(k).mT * q.shape[-1] ** -0.5 - lse).exp()
    out = (p * keep / KEPT) @ wide(v)
    return out.to(q.dtype), [q, k, v, out, lse, keep]


def _dropped_backward(saved, g, factor=1 / KEPT):
    q, k, v, out, lse, keep = saved
    scaled = keep.to(lse.dtype) * factor
    return *flash_backward(q, k, v, out, lse, g, None, None, q.shape[-1] ** -0.5, keep=scaled), None


DROPOUT = Pair(
    dropped_attention,
    kernel(_dropped_forward, _dropped_backward),
    _dropout_inputs,
    {
        "no 1/(1-p) in backward": Wrong(
            kernel(_dropped_forward, partial(_dropped_backward, factor=1.0)), "input:q input:k input:v"
        )
    },
)


# Grouped queries
def grouped_attention(q, k, v):
    groups = q.shape[1] // k.shape[1]
    return attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def _grouped_forward(q, k, v):
    groups = q.shape[1] // k.shape[1]
    out, saved = _attention_forward(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    return out, saved


def _grouped_backward(saved, g, last_head=False, groups=2):
    dq, dk, dv = _attention_backward(saved, g)
    dk, dv = (each.unflatten(1, (-1, groups)) for each in (dk, dv))
    return dq, *((each[:, :, -1] if last_head else each.sum(2)) for each in (dk, dv))


def interleaved_heads(q, k, v):
    groups = q.shape[1] // k.shape[1]
    return attention(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))


GROUPED = Pair(
    grouped_attention,
    kernel(_grouped_forward, _grouped_backward),
    partial(qkv, heads=4, kv_heads=2),
    {
        "dK and dV of the last head of a group": Wrong(
            kernel(_grouped_forward, partial(_grouped_backward, last_head=True)),
            "input:k input:v",
            source="levanter 449",
        ),
        "heads interleaved": Wrong(
            interleaved_heads, "output input:q input:k input:v", source="native-sparse-attention-triton 27"
        ),
    },
)


# ALiBi, a sliding window and a soft cap: kernels by another order of the computation
def slopes(heads, first=1):
    return 2.0 ** (-torch.arange(first, heads + first) * 8 / heads).reshape(-1, 1, 1)


def alibi(q, k, v, first=1, symmetric=False):
    gap = torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]
    bias = slopes(q.shape[1], first) * (-gap.abs() if symmetric else gap)
    scores = (q @ k.mT) / math.sqrt(q.shape[-1]) + bias.to(q.dtype)
    seen = causal(q.shape[-2])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def _alibi_forward(q, k, v, first=1):
    # The kernel's bias is relative to key 0: each row differs by a constant, which softmax does not see.
    bias = (slopes(q.shape[1], first) * torch.arange(k.shape[-2])).to(wide(q).dtype)
    out, lse = flash(q, k, v, causal(q.shape[-2]), bias, q.shape[-1] ** -0.5)
    return out.to(q.dtype), [q, k, v, out, lse, bias]


def _alibi_backward(saved, g, without_bias=False):
    *tensors, bias = saved
    bias = torch.zeros_like(bias) if without_bias else bias
    return flash_backward(*tensors, g, causal(g.shape[-2]), bias, tensors[0].shape[-1] ** -0.5)


ALIBI = Pair(
    alibi,
    kernel(_alibi_forward, _alibi_backward),
    qkv,
    {
        "slopes from head 0": Wrong(partial(alibi, first=0), "output input:q input:k input:v"),
        "no bias in backward": Wrong(
            kernel(_alibi_forward, partial(_alibi_backward, without_bias=True)), "input:q input:k input:v"
        ),
    },
)


def windowed(q, k, v, window=WINDOW):
    scores = ((q @ k.mT) / math.sqrt(q.shape[-1])).masked_fill(~causal(q.shape[-2], window), -math.inf)
    return scores.softmax(-1) @ v


def _windowed_forward(q, k, v):
    out, lse = flash(q, k, v, causal(q.shape[-2], WINDOW), None, q.shape[-1] ** -0.5)
    return out.to(q.dtype), [q, k, v, out, lse]


def _windowed_backward(saved, g, window=WINDOW):
    return flash_backward(*saved, g, causal(g.shape[-2], window), None, g.shape[-1] ** -0.5)


WINDOWED = Pair(
    windowed,
    kernel(_windowed_forward, _windowed_backward),
    qkv,
    {
        "window one key longer in backward": Wrong(
            kernel(_windowed_forward, partial(_windowed_backward, window=WINDOW + 1)),
            "input:q input:k input:v",
            hidden_at={"length": WINDOW},
        ),
        "window one key shorter": Wrong(
            partial(windowed, window=WINDOW - 1), "output input:q input:k input:v", source="transformers 39408"
        ),
    },
)


def capped(q, k, v):
    scores = CAP * torch.tanh((q @ k.mT) / math.sqrt(q.shape[-1]) / CAP)
    return scores.softmax(-1) @ v


def _capped_forward(q, k, v):
    capped_scores = CAP * torch.tanh(wide(q) @ wide(k).mT * (q.shape[-1] ** -0.5 / CAP))
    p = capped_scores.softmax(-1)
    return (p @ wide(v)).to(q.dtype), [q, k, v, p, capped_scores]


def _capped_backward(saved, g, without_tanh=False):
    q, k, v, p, scores = saved
    dtype, (q, k, v, g) = q.dtype, map(wide, (q, k, v, g))
    dp = g @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    ds = (ds if without_tanh else ds * (1 - (scores / CAP) ** 2)) * q.shape[-1] ** -0.5
    return (ds @ k).to(dtype), (ds.mT @ q).to(dtype), (p.mT @ g).to(dtype)


CAPPED = Pair(
    capped,
    kernel(_capped_forward, _capped_backward),
    qkv,
    {
        "no derivative of the soft cap": Wrong(
            kernel(_capped_forward, partial(_capped_backward, without_tanh=True)),
            "input:q input:k",
        )
    },
)

PAIRS = {
    "attention": PLAIN,
    "masked attention": MASKED,
    "attention with dropout": DROPOUT,
    "grouped attention": GROUPED,
    "ALiBi": ALIBI,
    "sliding window": WINDOWED,
    "attention with a soft cap": CAPPED,
}
