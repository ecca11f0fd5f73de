"""Products that are accumulated, grouped, quantised, scaled or batched."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from tests.kernels.pairs import ALL, Pair, Wrong, kernel, narrow_only, normal, wide


# A product whose candidates refuse float64, as compiled kernels do: only the native dtype can tell
def linear(x, weight):
    return x @ weight.mT


def _linear_forward(x, weight, store=None, blocks=None):
    if blocks is None:
        out = wide(x) @ wide(weight).mT
    else:  # split-K: partial sums in the dtype of the input
        parts = zip(x.split(blocks, -1), weight.split(blocks, -1), strict=True)
        out = sum((a @ b.mT for a, b in parts), torch.zeros((), dtype=x.dtype))
    return (store or to_nearest)(out, x.dtype), [x, weight]


def _linear_backward(saved, g, factor=1.0, store=None, skipped=None):
    x, weight = saved
    dx = factor * (wide(g) @ wide(weight))
    if skipped:
        dx[:, skipped - 1 :: skipped] = 0
    return (store or to_nearest)(dx, x.dtype), to_nearest(wide(g).mT @ wide(x), x.dtype)


def to_nearest(tensor, dtype):
    return tensor.to(dtype)


def truncate(tensor, dtype):
    """Return a float32 tensor in bfloat16, rounded towards zero: its upper 16 bits; float16 likewise."""
    if tensor.dtype != torch.float32 or dtype == torch.float32:
        return tensor.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13
    return (tensor.contiguous().view(torch.int32) >> dropped << dropped).view(torch.float32).to(dtype)


def _linear_inputs(generator, batch=24, inner=64, out=40):
    return normal(generator, (batch, inner), (out, inner))


LINEAR = Pair(
    linear,
    narrow_only(kernel(_linear_forward, _linear_backward)),
    _linear_inputs,
    {
        "gradient 1 % too large": Wrong(
            narrow_only(kernel(_linear_forward, partial(_linear_backward, factor=1.01))), "input:x"
        ),
        "gradient 2 % too small": Wrong(
            narrow_only(kernel(_linear_forward, partial(_linear_backward, factor=0.98))), "input:x"
        ),
        "truncated output": Wrong(
            narrow_only(kernel(partial(_linear_forward, store=truncate), _linear_backward)),
            "output",
            kind="bias",
            dtypes=ALL[1:],
        ),
        "truncated gradient": Wrong(
            narrow_only(kernel(_linear_forward, partial(_linear_backward, store=truncate))),
            "input:x",
            kind="bias",
            dtypes=ALL[1:],
        ),
        "each fourth column of the gradient zero": Wrong(
            narrow_only(kernel(_linear_forward, partial(_linear_backward, skipped=4))),
            "input:x",
            source="pytorch 188841",
        ),
        "last column of the gradient zero": Wrong(
            narrow_only(kernel(_linear_forward, partial(_linear_backward, skipped=64))), "input:x"
        ),
    },
)

# All addends are positive: an accumulator of the narrow dtype loses the small ones (swamping).
SPLIT_K = Pair(
    linear,
    kernel(_linear_forward, _linear_backward),
    lambda generator: tuple(each.abs() for each in normal(generator, (12, 1024), (16, 1024))),
    {
        "accumulated in the dtype of the input": Wrong(
            kernel(partial(_linear_forward, blocks=4), _linear_backward),
            "output",
            kind="precision",
            dtypes=ALL[1:],
            source="axolotl 1601",
        ),
        "the same, compiled": Wrong(
            narrow_only(kernel(partial(_linear_forward, blocks=4), _linear_backward)),
            "output",
            kind="precision",
            dtypes=ALL[1:],
        ),
    },
)


# LoRA
def lora(x, weight, down, up):
    return x @ weight.mT + 2.0 * (x @ down.mT @ up.mT)


def _lora_forward(x, weight, down, up):
    inner = wide(x) @ wide(down).mT
    return (wide(x) @ wide(weight).mT + 2.0 * (inner @ wide(up).mT)).to(x.dtype), [x, weight, down, up, inner]


def _lora_backward(saved, g, scale=2.0):
    x, weight, down, up, inner = saved
    dtype, (x, weight, down, up, g) = x.dtype, map(wide, (x, weight, down, up, g))
    dinner = 2.0 * (g @ up)
    gradients = g @ weight + dinner @ down, g.mT @ x, dinner.mT @ x, scale * (g.mT @ inner)
    return tuple(each.to(dtype) for each in gradients)


LORA = Pair(
    lora,
    kernel(_lora_forward, _lora_backward),
    lambda generator: normal(generator, (20, 32), (24, 32), (4, 32), (24, 4)),
    {"no scale in dB": Wrong(kernel(_lora_forward, partial(_lora_backward, scale=1.0)), "input:up")},
)


# Grouped and causal convolutions
def grouped_convolution(x, weight, bias):
    return F.conv1d(x, weight, bias, padding=1, groups=4)


def _unfolded(x, groups, width):
    return F.pad(x, (1, 1)).unfold(-1, width, 1).unflatten(1, (groups, -1))  # batch, group, channel, place, tap


def _convolution_forward(x, weight, bias):
    taps = wide(weight).unflatten(0, (4, -1))
    out = torch.einsum("bgctk,gock->bgot", _unfolded(wide(x), 4, 3), taps).flatten(1, 2)
    return (out + wide(bias)[:, None]).to(x.dtype), [x, weight]


def _convolution_backward(saved, g, next_group=False):
    x, weight = saved
    g = wide(g)
    taps, grouped = wide(weight).unflatten(0, (4, -1)), g.unflatten(1, (4, -1))
    seen = _unfolded(wide(x), 4, 3)
    seen = seen.roll(1, 1) if next_group else seen
    dweight = torch.einsum("bgot,bgctk->gock", grouped, seen).flatten(0, 1)
    back = F.pad(grouped, (1, 1)).unfold(-1, 3, 1)
    dx = torch.einsum("bgotk,gock->bgct", back, taps.flip(-1)).flatten(1, 2)
    return dx.to(x.dtype), dweight.to(x.dtype), g.sum((0, 2)).to(x.dtype)


GROUPED_CONVOLUTION = Pair(
    grouped_convolution,
    kernel(_convolution_forward, _convolution_backward),
    lambda generator: normal(generator, (3, 8, 16), (12, 2, 3), (12,)),
    {
        "weight gradient from the next group": Wrong(
            kernel(_convolution_forward, partial(_convolution_backward, next_group=True)), "input:weight"
        )
    },
)


def causal_convolution(x, weight, bias):
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=len(weight))[..., : x.shape[-1]])


def _causal_forward(x, weight, bias):
    seen = F.pad(wide(x), (3, 0)).unfold(-1, 4, 1)
    return F.silu((seen * wide(weight)[:, None]).sum(-1) + wide(bias)[:, None]).to(x.dtype), [x, weight, bias]


def _causal_backward(saved, g, flipped=False, without_halo=None):
    x, weight, bias = saved
    seen, taps = F.pad(wide(x), (3, 0)).unfold(-1, 4, 1), wide(weight)[:, None]
    before = (seen * taps).sum(-1) + wide(bias)[:, None]
    sigmoid = before.sigmoid()
    dbefore = wide(g) * sigmoid * (1 + before * (1 - sigmoid))
    dweight = (dbefore[..., None] * seen).sum((0, 2))
    blocks = dbefore.split(without_halo or x.shape[-1], -1)  # a block that does not see the next one's first values
    dx = torch.cat([(F.pad(each, (0, 3)).unfold(-1, 4, 1) * taps.flip(-1)).sum(-1) for each in blocks], -1)
    gradients = dx, dweight.flip(-1) if flipped else dweight, dbefore.sum((0, 2))
    return tuple(each.to(x.dtype) for each in gradients)


CAUSAL_CONVOLUTION = Pair(
    causal_convolution,
    kernel(_causal_forward, _causal_backward),
    lambda generator, length=24: normal(generator, (2, 6, length), (6, 4), (6,)),
    {
        "taps of the weight gradient in reverse": Wrong(
            kernel(_causal_forward, partial(_causal_backward, flipped=True)), "input:weight"
        ),
        "halo between blocks of 16": Wrong(
            kernel(_causal_forward, partial(_causal_backward, without_halo=16)), "input:x", hidden_at={"length": 16}
        ),
    },
)


# Quantised: straight-through rounding within the range of int8, by row of the weight
def quantised_linear(x, weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 100
    scaled = weight / scale
    clamped = scaled.clamp(-90, 90)
    return x @ ((clamped + (clamped.round() - clamped).detach()) * scale).mT


def _quantised_forward(x, weight):
    scale = wide(weight).abs().amax(1, keepdim=True) / 100
    rounded = (wide(weight) / scale).clamp(-90, 90).round()
    return (wide(x) @ rounded.mT * scale.mT).to(x.dtype), [x, weight, rounded, scale]


def _quantised_backward(saved, g, without_scale=False, without_range=False):
    x, weight, rounded, scale = saved
    g, inside = wide(g), (wide(weight) / scale).abs() <= 90
    dweight = g.mT @ wide(x)
    dweight = dweight if without_range else dweight * inside
    dx = g @ rounded if without_scale else (g * scale.mT) @ rounded
    return dx.to(x.dtype), dweight.to(x.dtype)


# In a narrow dtype the reference rounds weight / scale to another integer now and then: float32 only.
QUANTISED = Pair(
    quantised_linear,
    kernel(_quantised_forward, _quantised_backward),
    lambda generator: normal(generator, (16, 32), (20, 32)),
    {
        "no scale in dx": Wrong(
            kernel(_quantised_forward, partial(_quantised_backward, without_scale=True)), "input:x", source="ao 3171"
        ),
        "gradient of weights outside of the range": Wrong(
            kernel(_quantised_forward, partial(_quantised_backward, without_range=True)),
            "input:weight",
            source="nni 3159",
        ),
    },
    dtypes=ALL[:1],
)


# A batched product: right for two matrices at most, or for contiguous ones only
def batched_product(left, right):
    return left @ right


def _product_forward(left, right, by_storage=False):
    seen = torch.as_strided(left, left.shape, (left[0].numel(), left.shape[-1], 1)) if by_storage else left
    out = torch.einsum("bij,bjk->bik", wide(seen), wide(right))
    return out.to(left.dtype), [left, right]


def _product_backward(saved, g, last=None):
    left, right = saved
    dright = wide(left).mT @ wide(g)
    if last is not None:
        dright[last:] = 0
    return (wide(g) @ wide(right).mT).to(left.dtype), dright.to(left.dtype)


BATCHED = Pair(
    batched_product,
    kernel(_product_forward, _product_backward),
    lambda generator, batch=4: normal(generator, (batch, 6, 10), (batch, 10, 8)),
    {
        "no gradient from the third matrix on": Wrong(
            kernel(_product_forward, partial(_product_backward, last=2)), "input:right", hidden_at={"batch": 2}
        ),
        "strides of the first operand not read": Wrong(
            kernel(partial(_product_forward, by_storage=True), _product_backward), "output", on="non-contiguous"
        ),
    },
)

PAIRS = {
    "linear": LINEAR,
    "split-K": SPLIT_K,
    "LoRA": LORA,
    "grouped convolution": GROUPED_CONVOLUTION,
    "causal convolution": CAUSAL_CONVOLUTION,
    "quantised linear": QUANTISED,
    "batched product": BATCHED,
}
