"""Recurrent layers as Scans: outputs, states and gradients are torch's own, whatever the options."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradctl.forms.onnx.joint import export_graph
from gradctl.joint.recurrent import ScannedLayers
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from tests.joint.joined import by_autograd, by_onnxruntime, differing, joint_graph

KINDS: dict[str, Any] = {
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
    "LSTM with a projection": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 2, "bias": False, "batch_first": True},
]


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for each in value for leaf in flat(each)]


def given(layer: nn.RNNBase) -> tuple[Any, ...]:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    batch = 5 if layer.batch_first else 2
    directions = 2 if layer.bidirectional else 1
    hidden = torch.randn(layer.num_layers * directions, batch, layer.proj_size or 4, dtype=torch.float64)
    memory = torch.randn(layer.num_layers * directions, batch, 4, dtype=torch.float64)
    return x, (hidden, memory) if isinstance(layer, nn.LSTM) else hidden


def results(layer: nn.RNNBase, inputs: tuple[Any, ...], *, scanned: bool, twice: bool = False) -> list[Tensor]:
    leaves = [*flat(inputs), *layer.parameters()]
    with ScannedLayers() if scanned else nullcontext():
        outputs = flat(layer(*inputs))
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in outputs]
        found = torch.autograd.grad(outputs, leaves, cotangents, create_graph=twice)
        if twice:
            total = sum(each.square().sum() for each in found)
            found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*outputs, *found]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_as_torch_has_it(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4, **options).double()
    inputs = given(layer)
    for each in flat(inputs):
        each.requires_grad_()
    torch.testing.assert_close(results(layer, inputs, scanned=True), results(layer, inputs, scanned=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_differentiated_again(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4).double()
    inputs = given(layer)
    for each in flat(inputs):
        each.requires_grad_()
    torch.testing.assert_close(
        results(layer, inputs, scanned=True, twice=True), results(layer, inputs, scanned=False, twice=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_both_ways_in_onnxruntime(kind: str) -> None:
    torch.manual_seed(0)
    assert differing(KINDS[kind](3, 4, num_layers=2, bidirectional=True), torch.randn(6, 2, 3)) == []


@pytest.mark.parametrize("kind", ["GRU", "LSTM with a projection"])
def test_a_free_number_of_steps(kind: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4, bidirectional=True, batch_first=True)
    subject = Subject(target="test", model=layer, args=(torch.randn(2, 5, 3),))
    dynamic = {"input": {0: "batch", 1: "time"}}
    graph = ir.to_proto(export_graph(Instance(subject, keep_hooks=True), dynamic=dynamic).artifact)
    for batch, time in ((2, 5), (3, 9), (1, 1)):
        values, expected = by_autograd(layer, torch.randn(batch, time, 3))
        found = by_onnxruntime(graph, values)
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want.detach(), rtol=1e-4, atol=1e-5)
        layer.zero_grad()


class Forces(nn.Module):
    """The gradient of an energy, which is differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        energy = self.layer(x)[0].square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.slow
def test_forces_of_a_recurrent_energy() -> None:
    torch.manual_seed(0)
    assert differing(Forces(), torch.randn(3, 2, 3)) == []


class Cells(nn.Module):
    """Steps that the user writes, and a layer of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, memory, state = x.new_zeros(2, 4), x.new_zeros(2, 4), x.new_zeros(2, 4)
        for each in x:
            hidden, memory = self.first(each, (hidden, memory))
            state = self.second(hidden, state)
        return self.last(state.unsqueeze(0))[1]


def test_cells_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    assert differing(Cells(), torch.randn(3, 2, 3)) == []


def test_the_number_of_nodes_does_not_grow_with_the_steps() -> None:
    counts = {len(joint_graph(nn.GRU(3, 4), torch.randn(time, 2, 3)).graph.node) for time in (3, 30)}
    assert len(counts) == 1


def test_a_packed_sequence_is_left_to_torch() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4), torch.randn(4, 2, 3)

    def last(scanned: bool) -> Tensor:
        with ScannedLayers() if scanned else nullcontext():
            return pad_packed_sequence(layer(pack_padded_sequence(x, torch.tensor([4, 2])))[0])[0]

    torch.testing.assert_close(last(True), last(False), rtol=0, atol=0)
