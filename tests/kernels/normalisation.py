"""Normalisation: statistics of rows, groups or a batch, and backwards that keep them or compute them again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.kernels.pairs import ALL, Pair, Wrong, kernel, wide

EPS = 1e-2  # large enough that its place in the formula shows


def rows(generator, batch=4, length=6, width=64, offset=0.0):
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    return torch.randn(batch, length, width, generator=generator) + offset, weight


# RMSNorm
def rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _rms_forward(x, weight, eps_outside=False):
    own = wide(x)
    square = own.square().mean(-1, keepdim=True)
    rstd = 1 / (square.sqrt() + EPS) if eps_outside else (square + EPS).rsqrt()
    return (own * rstd * wide(weight)).to(x.dtype), [x, weight, rstd]


def _rms_backward(saved, g, rows_of_dw=None, without_projection=False, weight_twice=False):
    x, weight, rstd = saved
    own, g = wide(x) * rstd, wide(g)
    gw = g * wide(weight)
    projection = 0 if without_projection else own * (gw * own).mean(-1, keepdim=True)
    dx = (gw - (projection * wide(weight) if weight_twice else projection)) * rstd
    dw = (g * own)[:rows_of_dw].sum((0, 1))
    return dx.to(x.dtype), dw.to(weight.dtype)


RMS = Pair(
    rms_norm,
    kernel(_rms_forward, _rms_backward),
    rows,
    {
        "dw of the first two rows of the batch": Wrong(
            kernel(_rms_forward, partial(_rms_backward, rows_of_dw=2)),
            "input:weight",
            hidden_at={"batch": 2},
            source="TransformerEngine 3216",
        ),
        "eps outside of the root": Wrong(
            kernel(partial(_rms_forward, eps_outside=True), _rms_backward), "output input:x input:weight"
        ),
        "no projection in dx": Wrong(kernel(_rms_forward, partial(_rms_backward, without_projection=True)), "input:x"),
        "weight twice in the projection": Wrong(
            kernel(_rms_forward, partial(_rms_backward, weight_twice=True)), "input:x", source="Megatron-LM 6859"
        ),
        "dw never written": Wrong(
            kernel(_rms_forward, partial(_rms_backward, rows_of_dw=0)), "input:weight", source="trueno 178"
        ),
    },
)


# Residual + RMSNorm: two outputs
def add_norm(x, residual, weight):
    total = x + residual
    return rms_norm(total, weight), total


def _add_norm_inputs(generator, **sizes):
    x, weight = rows(generator, **sizes)
    return x, torch.randn(x.shape, generator=generator), weight


def _add_forward(x, residual, weight):
    total = x + residual
    out, saved = _rms_forward(total, weight)
    return (out, total), saved


def _add_backward(saved, g, direct, lost=False, added_first=False):
    dx, dw = _rms_backward(saved, g + direct if added_first else g)
    through = dx if added_first else dx + direct
    return through, (dx if lost else through), dw


ADD_NORM = Pair(
    add_norm,
    kernel(_add_forward, _add_backward),
    _add_norm_inputs,
    {
        "gradient of the second output lost": Wrong(
            kernel(_add_forward, partial(_add_backward, lost=True)), "input:residual"
        ),
        "gradients added before the norm": Wrong(
            kernel(_add_forward, partial(_add_backward, added_first=True)),
            "input:x input:residual input:weight",
            source="quack 53",
        ),
    },
)


# LayerNorm
def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _layer_inputs(generator, **sizes):
    x, weight = rows(generator, **sizes)
    return x, weight, torch.randn(weight.shape, generator=generator)


def _layer_forward(x, weight, bias, narrow=False, last=None):
    own = wide(x)
    mean = own.mean(-1, keepdim=True)
    if narrow:  # E[x²] - E[x]² with accumulators of the input's dtype: where the mean is large, little remains
        mean = wide(x.sum(-1, keepdim=True) / x.shape[-1])
        variance = wide((x * x).mean(-1, keepdim=True) - mean.to(x.dtype).square()).clamp(min=0)
    else:
        variance = own.var(-1, unbiased=False, keepdim=True)
    rstd = (variance + EPS).rsqrt()
    normed = (own - mean) * rstd
    return (normed * wide(weight) + wide(bias)).to(x.dtype), [x, weight, mean, rstd]


def _layer_backward(saved, g, without_mean=False, summed=(0, 1)):
    x, weight, mean, rstd = saved
    normed, g = (wide(x) - mean) * rstd, wide(g)
    gw = g * wide(weight)
    centre = 0 if without_mean else gw.mean(-1, keepdim=True)
    dx = (gw - centre - normed * (gw * normed).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype), (g * normed).sum((0, 1)).to(weight.dtype), g.sum((0, 1)).to(weight.dtype)


LAYER = Pair(
    layer_norm,
    kernel(_layer_forward, _layer_backward),
    _layer_inputs,
    {
        "no mean term in dx": Wrong(kernel(_layer_forward, partial(_layer_backward, without_mean=True)), "input:x"),
    },
)

# The mean is 20 times the deviation: only then the accumulation dtype matters.
LAYER_OFFSET = Pair(
    layer_norm,
    LAYER.right,
    partial(_layer_inputs, offset=20.0),
    {
        "variance in the dtype of the input": Wrong(
            kernel(partial(_layer_forward, narrow=True), _layer_backward),
            "output input:x input:weight",
            kind="precision",
            dtypes=ALL[1:],
        )
    },
)


# GroupNorm
def group_norm(x, weight, bias):
    return F.group_norm(x, 4, weight, bias, EPS)


def _group_inputs(generator, batch=3, channels=8, size=6):
    shape = (channels,)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, 1 + 0.3 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _grouped(tensor):
    return tensor.unflatten(1, (4, -1))


def _per_channel(weight):
    return wide(weight).reshape(1, 4, -1, 1, 1)


def _group_forward(x, weight, bias):
    own = _grouped(wide(x))
    variance, mean = torch.var_mean(own, (2, 3, 4), correction=0, keepdim=True)
    rstd = (variance + EPS).rsqrt()
    out = (own - mean) * rstd * _per_channel(weight) + _per_channel(bias)
    return out.flatten(1, 2).to(x.dtype), [x, weight, mean, rstd]


def _group_backward(saved, g, neighbour=False, by_channel=False):
    x, weight, mean, rstd = saved
    normed, g = (_grouped(wide(x)) - mean) * rstd, _grouped(wide(g))
    gw = g * _per_channel(weight)
    axes = (3, 4) if by_channel else (2, 3, 4)
    dx = (gw - gw.mean(axes, keepdim=True) - normed * (gw * normed).mean(axes, keepdim=True)) * rstd
    dw = (g * (normed.roll(1, 1) if neighbour else normed)).sum((0, 3, 4)).flatten()
    return dx.flatten(1, 2).to(x.dtype), dw.to(weight.dtype), g.sum((0, 3, 4)).flatten().to(weight.dtype)


GROUP = Pair(
    group_norm,
    kernel(_group_forward, _group_backward),
    _group_inputs,
    {
        "dw of the next group": Wrong(kernel(_group_forward, partial(_group_backward, neighbour=True)), "input:weight"),
        "means by channel": Wrong(kernel(_group_forward, partial(_group_backward, by_channel=True)), "input:x"),
    },
)


# L2 normalisation of queries and keys, and weight normalisation
def l2_normalise(x):
    return x / x.norm(dim=-1, keepdim=True)


def _l2_forward(x):
    rnorm = wide(x).square().sum(-1, keepdim=True).rsqrt()
    return (wide(x) * rnorm).to(x.dtype), [x, rnorm]


def _l2_backward(saved, g, without_projection=False):
    x, rnorm = saved
    unit, g = wide(x) * rnorm, wide(g)
    inner = 0 if without_projection else unit * (g * unit).sum(-1, keepdim=True)
    return ((g - inner) * rnorm).to(x.dtype)


L2 = Pair(
    l2_normalise,
    kernel(_l2_forward, _l2_backward),
    lambda generator: rows(generator)[:1],
    {"no projection": Wrong(kernel(_l2_forward, partial(_l2_backward, without_projection=True)), "input:x")},
)


def weight_norm(x, direction, gain):
    return x @ (direction * (gain / direction.norm(dim=1))[:, None]).mT


def _weight_norm_inputs(generator, batch=12, width=24, out=16):
    return (
        torch.randn(batch, width, generator=generator),
        torch.randn(out, width, generator=generator),
        1 + 0.3 * torch.randn(out, generator=generator),
    )


def _weight_norm_forward(x, direction, gain):
    rnorm = wide(direction).square().sum(1, keepdim=True).rsqrt()
    unit = wide(direction) * rnorm
    return (wide(x) @ unit.mT * wide(gain)).to(x.dtype), [x, direction, gain, rnorm]


def _weight_norm_backward(saved, g, without_projection=False):
    x, direction, gain, rnorm = saved
    unit, dw = wide(direction) * rnorm, wide(g).mT @ wide(x)
    dgain = (dw * unit).sum(1)
    inner = 0 if without_projection else unit * dgain[:, None]
    dx = wide(g) @ (unit * wide(gain)[:, None])
    ddirection = (dw - inner) * rnorm * wide(gain)[:, None]
    return dx.to(x.dtype), ddirection.to(x.dtype), dgain.to(x.dtype)


WEIGHT_NORM = Pair(
    weight_norm,
    kernel(_weight_norm_forward, _weight_norm_backward),
    _weight_norm_inputs,
    {
        "no projection": Wrong(
            kernel(_weight_norm_forward, partial(_weight_norm_backward, without_projection=True)), "input:direction"
        )
    },
)


# Softmax over rows in place, as a kernel that keeps only its output
def softmax(x):
    return x.softmax(-1)


def _softmax_forward(x):
    top = wide(x).amax(-1, keepdim=True)
    out = (wide(x) - top).exp_()
    out /= out.sum(-1, keepdim=True)
    return out.to(x.dtype), [out]


def _softmax_backward(saved, g, block=None):
    (p,), dtype, g = saved, g.dtype, wide(g)
    inner = (g * p)[..., :block].sum(-1, keepdim=True)
    return (p * (g - inner)).to(dtype)


SOFTMAX = Pair(
    softmax,
    kernel(_softmax_forward, _softmax_backward),
    lambda generator, width=40: (torch.randn(12, width, generator=generator),),
    {
        "sum over the first block of 32": Wrong(
            kernel(_softmax_forward, partial(_softmax_backward, block=32)), "input:x", hidden_at={"width": 32}
        ),
        # The values are near 1/40: zeros are within an absolute tolerance of 5e-2.
        "zeros": Wrong(lambda x: x * 0, "output input:x", source="KernelBench 165"),
    },
)


# BatchNorm in training: a module with buffers
class BatchNorm(nn.Module):
    """Batch statistics by hand; ``mistake`` is one of the two below."""

    def __init__(self, mistake: str | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(1 + 0.3 * torch.randn(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.mistake = mistake
        self.kernel = kernel(_batch_forward, partial(_batch_backward, without_means=mistake == "means"))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(wide(x.detach()), 0, correction=0)
        count = len(x) if self.mistake == "variance" else len(x) - 1
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), 0.1)
        self.running_var.lerp_((variance * len(x) / count).to(self.running_var.dtype), 0.1)
        return self.kernel(x, self.weight, self.bias)


def _batch_forward(x, weight, bias):
    variance, mean = torch.var_mean(wide(x), 0, correction=0)
    rstd = (variance + 1e-5).rsqrt()
    return ((wide(x) - mean) * rstd * wide(weight) + wide(bias)).to(x.dtype), [x, weight, mean, rstd]


def _batch_backward(saved, g, without_means=False):
    x, weight, mean, rstd = saved
    normed, g, dtype = (wide(x) - mean) * rstd, wide(g), x.dtype
    means = 0 if without_means else g.mean(0) + normed * (g * normed).mean(0)
    dx = (g - means) * rstd * wide(weight)
    return dx.to(dtype), (g * normed).sum(0).to(dtype), g.sum(0).to(dtype)


BATCH = Pair(
    lambda: nn.BatchNorm1d(8),
    BatchNorm,
    lambda generator: (torch.randn(24, 8, generator=generator),),
    {
        "statistics held constant": Wrong(partial(BatchNorm, "means"), "input:input"),
        "biased running variance": Wrong(partial(BatchNorm, "variance"), "buffer:running_var"),
    },
    is_module=True,
)

PAIRS = {
    "RMSNorm": RMS,
    "residual and RMSNorm": ADD_NORM,
    "LayerNorm": LAYER,
    "LayerNorm of a large mean": LAYER_OFFSET,
    "GroupNorm": GROUP,
    "L2 normalisation": L2,
    "weight normalisation": WEIGHT_NORM,
    "softmax": SOFTMAX,
}
