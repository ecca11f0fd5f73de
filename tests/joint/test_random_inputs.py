"""Random draws are inputs of the joint graph: given what eager draws, it gives the gradients that eager has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradctl.forms.form import CannotCapture
from tests.joint.joined import by_autograd, by_onnxruntime, joint_graph

Draw = tuple[str, Callable[[], Tensor]]


class Act(nn.Module):
    """A linear layer, and a function of it and the inputs."""

    def __init__(self, act: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, *args: Any) -> Any:
        return self.act(self.linear, *args)


class Autoencoder(nn.Module):
    """The noise of a variational one is added in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.encode(x).chunk(2, -1)
        return self.decode(mean + torch.randn_like(mean) * (spread / 2).exp())


class Checkpointed(nn.Module):
    """Its backward draws again, from the state that the forward had."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh(), nn.Dropout(0.3))
        self.last, self.reentrant = nn.Dropout(0.4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        first = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.last(checkpoint(self.block, first, use_reentrant=self.reentrant))


def bernoulli(p: float, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.empty(shape).bernoulli_(p)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def of_linear(act: Callable[[Tensor], Tensor]) -> nn.Module:
    return Act(lambda linear, x: act(linear(x)))


def of_all_scalars(hidden: Tensor) -> Tensor:
    hidden = hidden + torch.empty_like(hidden).uniform_(-1, 1) * torch.rand(4)
    hidden = hidden * hidden.new_empty(3, 1).normal_(1.0, 0.5) + torch.normal(0.0, 2.0, (4,))
    return F.gumbel_softmax(hidden)[:, torch.randint(0, 4, (6,))][:, torch.randperm(6)]


def noise_written_twice(hidden: Tensor) -> Tensor:
    noise = torch.randn(4)
    noise.mul_(hidden.detach()[0])
    return hidden * noise


def forked(hidden: Tensor) -> Tensor:
    """What a reversible block does by hand: the same numbers twice."""
    state = torch.get_rng_state()
    hidden = F.dropout(hidden, 0.2)
    torch.set_rng_state(state)
    return F.dropout(hidden.sin(), 0.2)


# What eager draws after a seed, in its order: written down by hand.
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor, list[Draw]]]] = {
    "dropout": lambda: (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.3)),
        rows(3, 4),
        [("random.2", bernoulli(0.7, 3, 4))],
    ),
    "transformer layer": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1),
        rows(3, 2, 8),
        [
            ("random.self_attn", bernoulli(0.9, 2, 2, 3, 3)),
            ("random.dropout1", bernoulli(0.9, 3, 2, 8)),
            ("random.dropout", bernoulli(0.9, 3, 2, 16)),
            ("random.dropout2", bernoulli(0.9, 3, 2, 8)),
        ],
    ),
    "noise": lambda: (Autoencoder(), rows(5, 4), [("random", lambda: torch.randn(5, 3))]),
    "checkpoint": lambda: (
        Checkpointed(reentrant=False),
        rows(3, 4),
        [
            ("random.block.1.0", bernoulli(0.8, 3, 4)),
            ("random.block.3.0", bernoulli(0.7, 3, 4)),
            ("random.block.1.1", bernoulli(0.8, 3, 4)),
            ("random.block.3.1", bernoulli(0.7, 3, 4)),
            ("random.last", bernoulli(0.6, 3, 4)),
        ],
    ),
    "reentrant checkpoint": lambda: (
        Checkpointed(reentrant=True),
        *MODELS["checkpoint"]()[1:],
    ),
    "channels": lambda: (
        of_linear(lambda hidden: F.dropout1d(F.alpha_dropout(hidden, 0.2, True), 0.4)),
        rows(2, 3, 4),
        [("random.0", bernoulli(0.8, 2, 3, 4)), ("random.1", bernoulli(0.6, 2, 3, 1))],
    ),
    "scalar distributions": lambda: (
        of_linear(of_all_scalars),
        rows(3, 4),
        [
            ("random.0", lambda: torch.empty(3, 4).uniform_(-1, 1)),
            ("random.1", lambda: torch.rand(4)),
            ("random.2", lambda: torch.empty(3, 1).normal_(1.0, 0.5)),
            ("random.3", lambda: torch.normal(0.0, 2.0, (4,))),
            ("random.4", lambda: torch.empty(3, 4).exponential_()),
            ("random.5", lambda: torch.randint(0, 4, (6,))),
            ("random.6", lambda: torch.randperm(6)),
        ],
    ),
    "computed means": lambda: (
        of_linear(lambda hidden: hidden * torch.normal(hidden.detach(), 0.5)),
        rows(5, 4),
        [("random", lambda: torch.empty(5, 4).normal_())],
    ),
    "another order in memory": lambda: (
        of_linear(lambda hidden: F.dropout(hidden.transpose(1, 2), 0.2) + torch.rand_like(hidden.transpose(1, 2))),
        rows(3, 5, 4),
        [
            ("random.0", lambda: torch.empty(3, 5, 4).transpose(1, 2).bernoulli_(0.8)),
            ("random.1", lambda: torch.rand_like(torch.empty(3, 5, 4).transpose(1, 2))),
        ],
    ),
    "numbers that are written to": lambda: (
        of_linear(noise_written_twice),
        rows(3, 4),
        [("random", lambda: torch.randn(4))],
    ),
    "between recurrent layers": lambda: (
        nn.LSTM(4, 5, 3, dropout=0.3, bidirectional=True, batch_first=True),
        rows(2, 3, 4),
        [("random.0", bernoulli(0.7, 3, 2, 10)), ("random.1", bernoulli(0.7, 3, 2, 10))],
    ),
    "the same twice": lambda: (of_linear(forked), rows(3, 4), [("random", bernoulli(0.8, 3, 4))]),
}


@pytest.mark.parametrize("name", MODELS)
def test_given_what_eager_draws_gradients_are_those_of_autograd(name):
    torch.manual_seed(1)
    model, x, draws = MODELS[name]()
    graph = joint_graph(model, x)
    values, expected = by_autograd(model, x)  # which seeds with 0
    torch.manual_seed(0)
    values |= {drawn: draw() for drawn, draw in draws}
    assert {each.key for each in graph.metadata_props} == {drawn for drawn, _ in draws}
    found = by_onnxruntime(graph, values)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=1e-4, atol=1e-5)


def test_other_draws_give_other_gradients():
    """The graph hangs on what it is given: nothing of eager's draws is in it."""
    model, x, _ = MODELS["dropout"]()
    graph = joint_graph(model, x)
    values, _ = by_autograd(model, x)
    none, every = (by_onnxruntime(graph, {**values, "random.2": torch.full((3, 4), mask)}) for mask in (0.0, 1.0))
    assert not none["grad.input.input"].any()
    hidden = values["input.input"].clone().requires_grad_()
    (model[1](model[0](hidden)) / 0.7).backward(values["grad_output"])
    torch.testing.assert_close(every["grad.input.input"], hidden.grad)


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 2 + torch.randn_like(cotangent)


def seeded(hidden: Tensor) -> Tensor:
    torch.manual_seed(3)
    return hidden + torch.randn(4)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "computed probabilities": (
        lambda hidden: hidden * torch.bernoulli(hidden.detach().sigmoid()),
        r"aten.bernoulli draws random numbers by values that are computed \(test_random_inputs.py, line \d+\): draw",
    ),
    "multinomial": (
        lambda hidden: hidden[:, torch.multinomial(hidden.detach().sigmoid()[0], 2)],
        r"aten.multinomial draws .* \(test_random_inputs.py, line \d+\)",
    ),
    "as many as values say": (lambda hidden: F.rrelu(hidden, training=True), "aten.rrelu_with_noise draws"),
    "generator": (
        lambda hidden: hidden + torch.randn(4, generator=torch.Generator().manual_seed(2)),
        r"the forward draws from its own generator \(test_random_inputs.py, line \d+\)",
    ),
    "seed": (seeded, r"the model sets the state of torch's random generator \(test_random_inputs.py, line \d+\)"),
    "python": (lambda hidden: hidden * random.random(), "the forward draws random numbers from python's generator"),
    "numpy": (lambda hidden: hidden * np.random.rand(), "the forward draws random numbers from numpy's generator"),
    "backward": (NoisyBackward.apply, "the backward draws its own random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_nobody_outside_can_make_are_refused(name):
    act, said = REFUSED[name]
    with pytest.raises(CannotCapture, match=said):
        joint_graph(of_linear(act), rows(3, 4))


def test_a_recurrent_layer_without_dropout_draws_nothing():
    assert not joint_graph(nn.GRU(4, 4, 2), rows(3, 2, 4)).metadata_props
