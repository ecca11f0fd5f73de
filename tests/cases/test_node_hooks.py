"""Hooks on nodes of the graph (``grad_fn.register_prehook``) are gradient hooks: set aside, and noted."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def prehook(h):
    h.grad_fn.register_prehook(lambda gradients: (gradients[0].clamp(-0.1, 0.1),))


def posthook(h):
    h.grad_fn.register_hook(lambda to_inputs, to_outputs: (10 * to_inputs[0],))


def next_node(h):
    node, _ = h.grad_fn.next_functions[0]
    node.register_prehook(lambda gradients: (10 * gradients[0],))


def every_node(h):
    pending, seen = [h.grad_fn], set()
    while pending:
        node = pending.pop()
        if node in seen or isinstance(node, type(None)):
            continue
        seen.add(node)
        assert isinstance(node, torch.autograd.graph.Node)
        if "Accumulate" not in node.name():
            node.register_prehook(lambda gradients: tuple(g if g is None else 10 * g for g in gradients))
        pending.extend(following for following, _ in node.next_functions)


class Net(nn.Module):
    def __init__(self, hook=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.hook = nn.Linear(5, 6), nn.Linear(6, 3), hook

    def forward(self, x):
        h = self.a(x).tanh()
        if self.hook is not None:
            self.hook(h)
        return self.b(h)


class OfAParameter(Net):
    def forward(self, x):
        accumulate = self.a.weight.expand_as(self.a.weight).grad_fn.next_functions[0][0]
        accumulate.register_prehook(lambda gradients: (10 * gradients[0],))
        return super().forward(x)


class OfAModule(Net):
    def forward(self, x):
        handle = self.b.register_full_backward_hook(lambda module, to_input, to_output: (10 * to_input[0],))
        y = super().forward(x)
        handle.remove()
        return y


HOOKED = [*map(Net, (prehook, posthook, next_node, every_node)), OfAParameter(), OfAModule()]


@pytest.mark.parametrize("model", HOOKED, ids=["pre", "post", "next", "every", "parameter", "module"])
def test_a_hook_on_a_node_is_set_aside_and_noted(model):
    unit = judge(model, X)
    assert_passes(unit)
    assert {Path(each.location.file).name for each in unit.findings if each.code == "GC409"} == {Path(__file__).name}


def test_without_a_hook_there_is_no_note():
    assert "GC409" not in codes(judge(Net(), X))


def test_a_mistake_behind_a_hook_on_a_node_is_named():
    assert wrong_tensors(judge(plant(Net(prehook), "a.weight", "scale 1.1"), X)) == ["param:a.weight"]


class Penalised(nn.Module):
    """Reads the graph without hooks: a gradient at an edge, a name, a value kept for a Function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        assert h.grad_fn.name() == "TanhBackward0" == type(h.grad_fn).__name__
        edge = torch.autograd.graph.GradientEdge(h.grad_fn, 0)
        y = self.b(h).square()
        (slope,) = torch.autograd.grad(y.sum(), edge, create_graph=True)
        return y.mean() + slope.square().mean()


def test_a_program_that_reads_its_graph_passes():
    unit = judge(Penalised(), X)
    assert_passes(unit)
    assert "GC409" not in codes(unit)
