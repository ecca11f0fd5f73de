"""Modules: a layer and its rewritten version, whose parameters have the same names or others."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.kernels.normalisation import BATCH
from tests.kernels.pairs import Pair, Wrong, kernel, wide


def normal(*shape):
    return lambda generator, batch=4: (torch.randn(batch, *shape, generator=generator),)


# A gated MLP under other names
class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RewrittenMlp(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.w3, self.w1) if self.swapped else (self.w1, self.w3)
        both = F.linear(x, torch.cat([one.weight, two.weight]), torch.cat([one.bias, two.bias]))
        gate, up = both.chunk(2, -1)
        return self.w2(gate * gate.sigmoid() * up)


_MLP_NAMES = {
    f"{old}.{kind}": f"{new}.{kind}"
    for old, new in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items()
    for kind in ("weight", "bias")
}
_MLP_PARAMETERS = " ".join(f"param:{name}" for name in _MLP_NAMES if name != "down_proj.bias")

MLP = Pair(
    GatedMlp,
    RewrittenMlp,
    normal(16),
    {"gate and up swapped": Wrong(partial(RewrittenMlp, swapped=True), f"output input:x {_MLP_PARAMETERS}")},
    is_module=True,
    renamed=_MLP_NAMES,
)


# RMSNorm with a weight that is stored less 1
class ZeroCentredNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (32,), 1 + self.weight, 1e-5)


class FusedZeroCentredNorm(nn.Module):
    def __init__(self, offset: float = 1.0) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.zeros(32)), offset

    def forward(self, x: Tensor) -> Tensor:
        own = wide(x)
        normed = own * (own.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return (normed * (self.offset + wide(self.gain))).to(x.dtype)


ZERO_CENTRED = Pair(
    ZeroCentredNorm,
    FusedZeroCentredNorm,
    normal(32),
    {
        "offset of the weight dropped": Wrong(
            partial(FusedZeroCentredNorm, offset=0.0), "output input:x", source="Megatron-LM 6859"
        )
    },
    is_module=True,
    renamed={"weight": "gain"},
)


# A small language model whose head shares the embedding
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(11, 16), nn.Linear(16, 16)

    def forward(self, index: Tensor) -> Tensor:
        return self.middle(self.embedding(index)).tanh() @ self.embedding.weight.mT


def _tied_forward(hidden, weight):
    return (wide(hidden) @ wide(weight).mT).to(hidden.dtype), [hidden, weight]


def _tied_backward(saved, g, without_weight=False):
    hidden, weight = saved
    dweight = wide(g).flatten(0, 1).mT @ wide(hidden).flatten(0, 1)
    return (wide(g) @ wide(weight)).to(hidden.dtype), None if without_weight else dweight.to(weight.dtype)


class FusedTied(Tied):
    def __init__(self, without_weight: bool = False) -> None:
        super().__init__()
        self.head = kernel(_tied_forward, partial(_tied_backward, without_weight=without_weight))

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(index)).tanh(), self.embedding.weight)


TIED = Pair(
    Tied,
    FusedTied,
    lambda generator: (torch.randint(11, (3, 7), generator=generator),),
    {
        "gradient of the head lost": Wrong(partial(FusedTied, without_weight=True), "param:embedding.weight"),
    },
    is_module=True,
)


# Attention of separate projections, and of one product
class SeparateAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 8)).transpose(1, 2) for each in (self.q, self.k, self.v))
        weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class PackedAttention(nn.Module):
    def __init__(self, scale: float = 8**-0.5, heads_first: bool = True) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.scale, self.heads_first = scale, heads_first

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query, self.key, self.value
        packed = F.linear(x, torch.cat([each.weight for each in parts]), torch.cat([each.bias for each in parts]))
        shape = (3, 2, 8) if self.heads_first else (3, 8, 2)
        split = packed.unflatten(-1, shape)
        q, k, v = (split if self.heads_first else split.transpose(-1, -2)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


_ATTENTION_NAMES = {
    f"{old}.{kind}": f"{new}.{kind}"
    for old, new in {"q": "query", "k": "key", "v": "value", "out": "proj"}.items()
    for kind in ("weight", "bias")
}
# The bias of the keys has no gradient: softmax does not see it.
_ATTENTION_PARAMETERS = " ".join(f"param:{name}" for name in _ATTENTION_NAMES if name not in ("out.bias", "k.bias"))

ATTENTION = Pair(
    SeparateAttention,
    PackedAttention,
    normal(6, 16),
    {
        "no scale": Wrong(
            partial(PackedAttention, scale=1.0),
            f"output input:x {_ATTENTION_PARAMETERS}".replace(" param:v.bias", ""),
        ),
        "heads interleaved": Wrong(
            partial(PackedAttention, heads_first=False), f"output input:x {_ATTENTION_PARAMETERS}"
        ),
    },
    is_module=True,
    renamed=_ATTENTION_NAMES,
)


# Convolution and BatchNorm in evaluation, folded into one convolution
class ConvolutionNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Folded(ConvolutionNorm):
    def __init__(self, without_mean: bool = False) -> None:
        super().__init__()
        self.without_mean = without_mean

    def forward(self, x: Tensor) -> Tensor:
        norm, (mean, var) = self.norm, map(wide, (self.norm.running_mean, self.norm.running_var))
        factor = wide(norm.weight) * (var + norm.eps).rsqrt()
        bias = wide(norm.bias) - (0 if self.without_mean else mean * factor)
        return F.conv2d(wide(x), wide(self.conv.weight) * factor.reshape(-1, 1, 1, 1), bias).relu().to(x.dtype)


FOLDED = Pair(
    ConvolutionNorm,
    Folded,
    normal(3, 7, 7),
    {
        "mean not folded": Wrong(
            partial(Folded, without_mean=True),
            "output input:x param:conv.weight param:norm.weight param:norm.bias",
        )
    },
    is_module=True,
)


# Positions kept in a buffer, a residual and a scale of the layer
class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(0.1 + 0.1 * torch.rand(16)), nn.LayerNorm(16)
        self.register_buffer("positions", torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(x + self.positions[: x.shape[1]])


class FusedPositioned(Positioned):
    def __init__(self, without_residual: bool = False, first: int = 0) -> None:
        super().__init__()
        self.without_residual, self.first = without_residual, first

    def forward(self, x: Tensor) -> Tensor:
        own = wide(x) + wide(self.positions)[self.first : x.shape[1] + self.first]
        variance, mean = torch.var_mean(own, -1, correction=0, keepdim=True)
        normed = (own - mean) * (variance + self.norm.eps).rsqrt()
        out = wide(self.scale) * (normed * wide(self.norm.weight) + wide(self.norm.bias))
        return ((wide(x).detach() if self.without_residual else wide(x)) + out).to(x.dtype)


POSITIONED = Pair(
    Positioned,
    FusedPositioned,
    normal(9, 16),
    {
        "no gradient of the residual": Wrong(partial(FusedPositioned, without_residual=True), "input:x"),
        "positions from 1": Wrong(partial(FusedPositioned, first=1), "output input:x param:scale param:norm.weight"),
    },
    is_module=True,
)


# A codebook with running counts, straight-through
class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 4))
        self.register_buffer("counts", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.cdist(x, self.codes).argmin(-1)
        with torch.no_grad():
            self.counts.mul_(0.75).add_(0.25 * torch.bincount(chosen, minlength=8))
        return x + (self.codes[chosen] - x).detach()


class FusedCodebook(Codebook):
    def __init__(self, decay: float = 0.75, through: bool = True) -> None:
        super().__init__()
        self.decay = decay
        self.kernel = kernel(_chosen_forward, lambda saved, g: (g if through else 0 * g, None, None))

    def forward(self, x: Tensor) -> Tensor:
        # |x - c|² without |x|², which all codes have in common.
        chosen = (self.codes.square().sum(-1) - 2 * x.detach() @ self.codes.mT).argmin(-1)
        self.counts.lerp_(F.one_hot(chosen, 8).sum(0).to(self.counts.dtype), 1 - self.decay)
        return self.kernel(x, self.codes, chosen)


def _chosen_forward(x, codes, chosen):
    return codes[chosen], []


# Near a tie, a narrow dtype chooses another code: float32 only.
CODEBOOK = Pair(
    Codebook,
    FusedCodebook,
    lambda generator: (torch.randn(32, 4, generator=generator),),
    {
        "other decay of the counts": Wrong(partial(FusedCodebook, decay=0.7), "buffer:counts"),
        "not straight-through": Wrong(partial(FusedCodebook, through=False), "input:x"),
    },
    dtypes=(torch.float32,),
    is_module=True,
)

PAIRS = {
    "gated MLP": MLP,
    "zero-centred RMSNorm": ZERO_CENTRED,
    "tied weights": TIED,
    "attention module": ATTENTION,
    "folded BatchNorm": FOLDED,
    "positions and a residual": POSITIONED,
    "codebook": CODEBOOK,
    "BatchNorm": BATCH,
}
