"""Random correct nets, one a seed: convolution, attention, normalisation, pooling, gates, residuals, many activations.

A third of them get inputs exactly at kinks: zeros before a ReLU, equal values in a pooling window, values at the bound
of a clamp. Autograd's gradient is right for all of them, so whatever a check reports here is a false alarm.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["random_net"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "clamp": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "abs": lambda: Elementwise(torch.abs),
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softmax": lambda: nn.Softmax(dim=-1),
}


class Elementwise(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Gate(nn.Module):
    """``linear(x) * sigmoid(linear(x))``, or the larger of two linear maps."""

    def __init__(self, width: int, maxout: bool) -> None:
        super().__init__()
        self.value, self.gate, self.maxout = nn.Linear(width, width), nn.Linear(width, width), maxout

    def forward(self, x: Tensor) -> Tensor:
        if self.maxout:
            return torch.maximum(self.value(x), self.gate(x))
        return self.value(x) * self.gate(x).sigmoid()


class Attention(nn.Module):
    """Self-attention over [batch, time, width], causal or not."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Reduce(nn.Module):
    """One number out of a dimension: mean, amax (ties share), max (one index), norm, or logsumexp."""

    def __init__(self, how: str, dim: int) -> None:
        super().__init__()
        self.how, self.dim = how, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "max":
            return x.max(self.dim).values
        return {"mean": torch.mean, "amax": torch.amax, "norm": torch.linalg.vector_norm, "logsumexp": torch.logsumexp}[
            self.how
        ](x, dim=self.dim)


def random_net(seed: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the net of this seed and its inputs, in training or evaluation mode; the same each time it is called."""
    choose = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build, shape = choose.choice(
            [(_vector_net, (6, 8)), (_image_net, (3, 2, 8, 8)), (_sequence_net, (2, 5, 8)), (_token_net, (2, 5))]
        )
        model = build(choose)
        if build is _token_net:
            x = torch.randint(0, 12, shape)
        else:
            x = _at_kinks(torch.randn(shape), choose) if seed % 3 == 0 else torch.randn(shape)
        _disturb(model, choose)
    return model.train(choose.random() < 0.5), (x,)


def _at_kinks(x: Tensor, choose: random.Random) -> Tensor:
    """Return inputs at zeros, at ties (multiples of a half), or at the bounds of a clamp."""
    kind = choose.choice(["zero half", "all zero", "ties", "equal", "bounds"])
    if kind == "zero half":
        return x * (torch.rand(x.shape) < 0.5)
    if kind == "all zero":
        return torch.zeros_like(x)
    if kind == "ties":
        return (2 * x).round() / 2
    if kind == "equal":
        return torch.full_like(x, 0.5)
    return x.clamp(-1, 1).where(torch.rand(x.shape) < 0.5, x.sign())


def _disturb(model: nn.Module, choose: random.Random) -> None:
    """Set running statistics away from 0 and 1, and half the time all biases to zero, as initialisers do."""
    zero = choose.random() < 0.5
    for name, parameter in model.named_parameters():
        if zero and name.endswith("bias"):
            nn.init.zeros_(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def _activation(choose: random.Random) -> nn.Module:
    return _ACTIVATIONS[choose.choice(list(_ACTIVATIONS))]()


def _vector_block(width: int, choose: random.Random) -> nn.Module:
    layers = [nn.Linear(width, width, bias=choose.random() < 0.8)]
    layers += [choose.choice([nn.Identity, nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm])(width), _activation(choose)]
    if choose.random() < 0.2:
        layers.append(nn.Dropout(0.3))
    if choose.random() < 0.3:
        layers.append(Gate(width, maxout=choose.random() < 0.5))
    block = nn.Sequential(*layers)
    return Residual(block) if choose.random() < 0.5 else block


def _vector_net(choose: random.Random) -> nn.Module:
    first = [_activation(choose)] if choose.random() < 0.4 else []
    blocks = [_vector_block(8, choose) for _ in range(choose.randint(1, 3))]
    last = nn.Linear(8, 3) if choose.random() < 0.7 else Reduce(choose.choice(["amax", "max", "logsumexp", "norm"]), 1)
    return nn.Sequential(*first, *blocks, last)


def _image_net(choose: random.Random) -> nn.Module:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if choose.random() < 0.3 else []
    channels = 2
    for _ in range(choose.randint(1, 3)):
        wider = choose.choice([4, 6])
        layers.append(nn.Conv2d(channels, wider, choose.choice([1, 3]), padding="same", bias=choose.random() < 0.7))
        norms = [nn.Identity(), nn.BatchNorm2d(wider), nn.GroupNorm(2, wider), nn.InstanceNorm2d(wider, affine=True)]
        layers += [choose.choice(norms), _activation(choose)]
        channels = wider
    pools = [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.Upsample(size=4)]
    layers += [choose.choice(pools), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    model.eval()(torch.zeros(1, 2, 8, 8))  # LazyLinear learns its width; evaluation mode leaves the statistics alone
    return model


def _sequence_block(width: int, choose: random.Random) -> nn.Module:
    mixers = [
        lambda: Attention(width, causal=choose.random() < 0.5),
        lambda: nn.TransformerEncoderLayer(width, 2, 16, dropout=0.1, batch_first=True),
        lambda: Last(nn.GRU(width, width, batch_first=True)),
        lambda: Last(nn.LSTM(width, width, batch_first=True)),
    ]
    feed_forward = nn.Sequential(nn.Linear(width, 12), _activation(choose), nn.Linear(12, width))
    layers = [nn.LayerNorm(width), choose.choice(mixers)()]
    return nn.Sequential(Residual(nn.Sequential(*layers)), Residual(nn.Sequential(nn.LayerNorm(width), feed_forward)))


class Last(nn.Module):
    """The outputs of a recurrent module without its final state."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


def _sequence_net(choose: random.Random) -> nn.Module:
    blocks = [_sequence_block(8, choose) for _ in range(choose.randint(1, 2))]
    return nn.Sequential(*blocks, Reduce(choose.choice(["mean", "amax", "max"]), 1), nn.Linear(8, 3))


def _token_net(choose: random.Random) -> nn.Module:
    padding = choose.choice([None, 0])
    return nn.Sequential(nn.Embedding(12, 8, padding_idx=padding), _sequence_net(choose))
