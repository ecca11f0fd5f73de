"""Layers and small nets, right all of them: how to build each, and the shape of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.redteam.operators import BATCH as B
from tests.redteam.operators import WIDTH as D

__all__ = ["LAYERS", "OF_TOKENS", "Complex"]


class _Both(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x.flip(0))


class _Twice(_Both):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) - self.layer(x.flip(0).sin())


class _Self(_Both):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x, x, x)


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(D, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)
        return pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]


class _Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(D, 4)

    def forward(self, xs: Tensor) -> Tensor:
        state = (xs.new_zeros(xs.shape[1], 4), xs.new_zeros(xs.shape[1], 4))
        for x in xs:
            state = self.cell(x, state)
        return state[0]


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, places, None])
        return out


class _Residual(nn.Module):
    def __init__(self, gate: float = 1.0) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(D), nn.Linear(D, 8), nn.Linear(8, D)
        self.gate = nn.Parameter(torch.full((D,), gate))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.second(F.gelu(self.first(self.norm(x))))


class _Coupling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        scale, shift = self.net(a).chunk(2, -1)
        return torch.cat([a, b * scale.tanh().exp() + shift], -1), scale.tanh().sum(-1)


class _Unrolled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(15):
            z = (0.5 * self.layer(z) + x).tanh()
        return z


class _Euler(_Unrolled):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(10):
            x = x + 0.1 * self.layer(x).sin()
        return x


class _Hyper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", self.net(x).view(-1, 3, D), x)


class _Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(7, D)), nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys.t() / D**0.5).softmax(-1) @ self.values


class _Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Embedding(9, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.places(torch.arange(x.shape[1])))


class _Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=x.dtype)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(each.unflatten(-1, (3, 2))) * turn).flatten(-2) for each in (q, k)
        )
        mask = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v


class _Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        source, target = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 0, 4, 0]])
        message = self.message(torch.cat([x[source], x[target]], -1)).relu()
        return self.update(torch.zeros_like(x).index_add(0, target, message)) + x


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(6, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.middle(F.silu(self.down(x))))
        return self.up(torch.cat([F.interpolate(h, scale_factor=2.0), x], 1))


class _Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.zeros(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class _Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU()).requires_grad_(False).eval()
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.trunk(x)
        return self.head(h)


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(D, D), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(x).tanh()
        frozen = {name: each.detach() for name, each in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, frozen, fake), self.critic(fake.detach())


class _Fourier(nn.Module):
    def __init__(self, frequency: float) -> None:
        super().__init__()
        self.layer, self.frequency = nn.Linear(D, D), frequency

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((self.frequency * x).sin())


def _zeroed(layer: nn.Linear) -> nn.Linear:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _biased(layer: nn.Linear, by: float) -> nn.Linear:
    with torch.no_grad():
        layer.bias += by
    return layer


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).abs()


_IMAGE, _SEQUENCE = (2, 3, 6, 6), (3, 5, D)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), _IMAGE),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), _IMAGE),
    "conv2d, grouped": (lambda: nn.Conv2d(3, 6, 3, groups=3, dilation=2), _IMAGE),
    "conv2d, no bias": (lambda: nn.Conv2d(3, 4, (1, 3), bias=False), _IMAGE),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "transposed conv": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), _IMAGE),
    "conv, batch norm, relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), _IMAGE),
    "conv, batch norm, relu in eval": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(),
        _IMAGE,
    ),
    "conv, pool, linear": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        _IMAGE,
    ),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), _IMAGE),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)), _IMAGE),
    "layer norm": (lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), (B, D)),
    "layer norm of one element": (lambda: nn.Sequential(nn.Linear(D, 1), nn.LayerNorm(1)), (B, D)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(D, D), nn.RMSNorm(D)), (B, D)),
    "batch norm of a batch of two": (lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)), (2, D)),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, track_running_stats=False)),
        (B, D),
    ),
    "local response norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2)), _IMAGE),
    "prelu": (lambda: nn.Sequential(nn.Linear(D, D), nn.PReLU(D)), (B, D)),
    "prelu of one slope": (lambda: nn.Sequential(nn.Linear(D, D), nn.PReLU()), (B, D)),
    "bilinear": (lambda: _Both(nn.Bilinear(D, D, 3)), (B, D)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(D, 3)), (B, D)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(D, 3)), (B, D)),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(D, 3)), (B, D)),
    "old spectral norm twice": (lambda: _Twice(nn.utils.spectral_norm(nn.Linear(D, 3))), (B, D)),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(D, 3)), (B, D)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(D, D)), (B, D)),
    "gru": (lambda: nn.GRU(D, 5, batch_first=True), _SEQUENCE),
    "gru both ways": (lambda: nn.GRU(D, 3, num_layers=2, bidirectional=True), _SEQUENCE),
    "lstm": (lambda: nn.LSTM(D, 5), _SEQUENCE),
    "lstm with projection": (lambda: nn.LSTM(D, 5, proj_size=2), _SEQUENCE),
    "lstm with dropout": (lambda: nn.LSTM(D, 3, num_layers=2, dropout=0.3), _SEQUENCE),
    "rnn relu": (lambda: nn.RNN(D, 5, nonlinearity="relu"), _SEQUENCE),
    "packed gru": (_Packed, _SEQUENCE),
    "lstm cell": (_Cells, _SEQUENCE),
    "attention": (lambda: _Self(nn.MultiheadAttention(D, 2, batch_first=True)), _SEQUENCE),
    "attention with zero bias": (lambda: _Self(nn.MultiheadAttention(D, 3, add_bias_kv=True)), _SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), _SEQUENCE),
    "encoder layer without dropout": (
        lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, norm_first=True),
        _SEQUENCE,
    ),
    "encoder layer in eval": (lambda: nn.TransformerEncoderLayer(D, 2, 8).eval(), _SEQUENCE),
    "decoder layer": (lambda: _Both(nn.TransformerDecoderLayer(D, 2, 8, dropout=0.0)), _SEQUENCE),
    "mixture of experts": (_Experts, (B, D)),
    "residual blocks": (lambda: nn.Sequential(*[_Residual() for _ in range(4)]), (B, D)),
    "residual blocks with zero gates": (lambda: nn.Sequential(*[_Residual(0.0) for _ in range(3)]), (B, D)),
    "layer scale of 1e-6": (lambda: nn.Sequential(*[_Residual(1e-6) for _ in range(3)]), (B, D)),
    "layer scale of 1e-9": (lambda: _Residual(1e-9), (B, D)),
    "coupling flow": (_Coupling, (B, D)),
    "implicit fixed point, unrolled": (_Unrolled, (B, D)),
    "neural ode, Euler": (_Euler, (B, D)),
    "hypernetwork": (_Hyper, (B, D)),
    "memory with softmax read": (_Memory, (B, D)),
    "positional encoding": (_Positional, _SEQUENCE),
    "rotary attention": (_Rotary, _SEQUENCE),
    "graph convolution": (_Graph, (5, D)),
    "unet": (_UNet, (1, 2, 8, 8)),
    "lora with a zero matrix": (_Lora, (B, D)),
    "adapter with frozen trunk": (_Adapter, (B, D)),
    "discriminator of detached": (_Detached, (B, D)),
    "zero layer": (lambda: _zeroed(nn.Linear(D, 3)), (B, D)),
    "zero layer and relu": (lambda: nn.Sequential(_zeroed(nn.Linear(D, D)), nn.ReLU(), nn.Linear(D, 2)), (B, D)),
    "dead relu": (lambda: nn.Sequential(_biased(nn.Linear(D, D), -50), nn.ReLU(), nn.Linear(D, 2)), (B, D)),
    "saturated sigmoid": (lambda: nn.Sequential(_biased(nn.Linear(D, D), 20), nn.Sigmoid(), nn.Linear(D, 2)), (B, D)),
    "saturated tanh": (lambda: nn.Sequential(_biased(nn.Linear(D, D), 15), nn.Tanh(), nn.Linear(D, 2)), (B, D)),
    "fourier features of 1e3": (lambda: _Fourier(1e3), (B, D)),
    "fourier features of 1e5": (lambda: _Fourier(1e5), (B, D)),
    "lazy layers": (lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)), (B, D)),
}
OF_TOKENS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(7, D),
    "embedding with padding": lambda: nn.Embedding(7, D, padding_idx=0),
    "embedding with scaled gradient": lambda: nn.Sequential(nn.Embedding(7, D), nn.Linear(D, 2)),
    "embedding bag": lambda: nn.EmbeddingBag(7, D, mode="sum"),
    "embedding bag of the mean": lambda: nn.EmbeddingBag(7, D, mode="mean"),
    "embedding bag of the maximum": lambda: nn.EmbeddingBag(7, D, mode="max"),
    "language model": lambda: nn.Sequential(
        nn.Embedding(7, D), nn.TransformerEncoderLayer(D, 2, 8, 0.0), nn.Linear(D, 7)
    ),
    "sparse embedding": lambda: nn.Embedding(7, D, sparse=True),
}
