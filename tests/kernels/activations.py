"""Activations, gated or with a bias, and their gradients by hand."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional as F

from tests.kernels.pairs import Pair, Wrong, kernel, normal, wide


# SwiGLU and GeGLU
def swiglu(gate, up):
    return F.silu(gate) * up


def _swiglu_forward(gate, up):
    own = wide(gate)
    return (own * own.sigmoid() * wide(up)).to(gate.dtype), [gate, up]


def _swiglu_backward(saved, g, only_sigmoid=False):
    gate, up = saved
    own, g = wide(gate), wide(g)
    sigmoid = own.sigmoid()
    slope = sigmoid if only_sigmoid else sigmoid * (1 + own * (1 - sigmoid))
    return (g * wide(up) * slope).to(gate.dtype), (g * own * sigmoid).to(up.dtype)


SWIGLU = Pair(
    swiglu,
    kernel(_swiglu_forward, _swiglu_backward),
    lambda generator: normal(generator, (8, 48), (8, 48)),
    {
        "derivative of silu without its second term": Wrong(
            kernel(_swiglu_forward, partial(_swiglu_backward, only_sigmoid=True)), "input:gate"
        )
    },
)


def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def _geglu_forward(gate, up):
    return (F.gelu(wide(gate), approximate="tanh") * wide(up)).to(gate.dtype), [gate, up]


def _geglu_backward(saved, g, erf=False):
    gate, up = saved
    own, g = wide(gate), wide(g)
    if erf:
        slope = 0.5 * (1 + torch.erf(own / math.sqrt(2))) + own * (-own.square() / 2).exp() / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (own + 0.044715 * own**3))
        slope = 0.5 * (1 + t) + 0.5 * own * (1 - t * t) * c * (1 + 3 * 0.044715 * own.square())
    return (g * wide(up) * slope).to(gate.dtype), (g * F.gelu(own, approximate="tanh")).to(up.dtype)


GEGLU = Pair(
    geglu,
    kernel(_geglu_forward, _geglu_backward),
    lambda generator: normal(generator, (8, 48), (8, 48)),
    {
        # 1e-3 of the gradient: less than the rounding of bfloat16.
        "tanh in forward, erf in backward": Wrong(
            kernel(_geglu_forward, partial(_geglu_backward, erf=True)), "input:gate"
        )
    },
)


# Bias and activation
def bias_gelu(x, bias):
    return F.gelu(x + bias)


def _bias_gelu_forward(x, bias):
    return F.gelu(wide(x) + wide(bias)).to(x.dtype), [x, bias]


def _bias_gelu_backward(saved, g, block=None):
    x, bias = saved
    own = wide(x) + wide(bias)
    slope = 0.5 * (1 + torch.erf(own / math.sqrt(2))) + own * (-own.square() / 2).exp() / math.sqrt(2 * math.pi)
    dx = wide(g) * slope
    return dx.to(x.dtype), dx[-block % len(dx) if block else 0 :].sum(0).to(bias.dtype)


BIAS_GELU = Pair(
    bias_gelu,
    kernel(_bias_gelu_forward, _bias_gelu_backward),
    lambda generator, batch=20: normal(generator, (batch, 32), (32,)),
    {
        "bias gradient of the last block of 16 rows": Wrong(
            kernel(_bias_gelu_forward, partial(_bias_gelu_backward, block=16)),
            "input:bias",
            hidden_at={"batch": 16},
            source="TransformerEngine 3216",
        )
    },
)


def prelu(x, slope):
    return F.prelu(x, slope)


def _prelu_forward(x, slope):
    return torch.where(x > 0, x, x * slope[:, None]), [x, slope]


def _prelu_backward(saved, g, all_elements=False):
    x, slope = saved
    own, g = wide(x), wide(g)
    part = g * own if all_elements else torch.where(own > 0, 0, g * own)
    return torch.where(own > 0, g, g * wide(slope)[:, None]).to(x.dtype), part.sum((0, 2)).to(slope.dtype)


PRELU = Pair(
    prelu,
    kernel(_prelu_forward, _prelu_backward),
    lambda generator: normal(generator, (4, 8, 30), (8,)),
    {
        "slope gradient of positive elements too": Wrong(
            kernel(_prelu_forward, partial(_prelu_backward, all_elements=True)), "input:slope"
        )
    },
)

PAIRS = {"SwiGLU": SWIGLU, "GeGLU": GEGLU, "bias and GELU": BIAS_GELU, "PReLU": PRELU}
