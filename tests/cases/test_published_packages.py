"""Packages with custom backwards, as published (extra ``packages``): right ones pass, meant ones are named.

Each was read before it was believed: entmax's backwards are closed forms, memcnn's recompute, torchdiffeq's integrates
an adjoint equation to a tolerance, snntorch's are surrogates by design, vector-quantize-pytorch detaches.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.judged import judge


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(unit, severity):
    return {finding.code for finding in unit.findings if finding.severity == severity}


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax_bisect", "sparsemax_bisect"])
def test_entmax_is_right(name):
    entmax = pytest.importorskip("entmax")
    unit = judge(nn.Sequential(nn.Linear(6, 5), _Activation(getattr(entmax, name))), drawn(4, 6))
    assert (unit.verdict, codes(unit, "error")) == ("pass", set())


def test_a_backward_of_entmax_that_forgets_the_sum_is_named(monkeypatch):
    activations = pytest.importorskip("entmax.activations")

    def without_the_sum(ctx, gradient):
        (probabilities,) = (each for each in ctx.saved_tensors if each.is_floating_point())
        return gradient * (probabilities.sqrt() > 0) * probabilities.sqrt(), None, None

    monkeypatch.setattr(activations.Entmax15Function, "backward", staticmethod(without_the_sum))
    unit = judge(nn.Sequential(nn.Linear(6, 5), _Activation(activations.entmax15)), drawn(4, 6))
    (headline,) = [each for each in unit.findings if each.severity == "error" and each.cause is None]
    assert (headline.code, headline.allow) == ("GC408", "GC408:Entmax15Function")


class _Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, dim=-1)


def test_a_reversible_block_of_memcnn_is_right():
    memcnn = pytest.importorskip("memcnn")
    block = memcnn.InvertibleModuleWrapper(
        memcnn.AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), keep_input=True
    )
    unit = judge(nn.Sequential(nn.Linear(8, 8), block), drawn(3, 8))
    assert codes(unit, "error") == set()


def test_the_adjoint_of_torchdiffeq_is_right_or_called_approximate():
    torchdiffeq = pytest.importorskip("torchdiffeq")

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, t, y):
            return torch.tanh(self.fc(y))

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = Field()

        def forward(self, y):
            return torchdiffeq.odeint_adjoint(self.field, y, torch.linspace(0, 1, 3, dtype=y.dtype))[-1]

    unit = judge(Flow(), drawn(2, 3))
    assert codes(unit, "error") == set()
    assert unit.verdict in ("pass", "inconclusive")


def test_a_surrogate_gradient_of_snntorch_is_named():
    snntorch = pytest.importorskip("snntorch")

    class Spiking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.neuron = snntorch.Leaky(beta=0.9)

        def forward(self, x):
            spikes, membrane = self.neuron(self.fc(x), torch.zeros(x.shape[0], 3))
            return spikes + membrane

    unit = judge(Spiking(), drawn(5, 4))
    assert {each.code for each in unit.findings if each.severity == "error" and each.cause is None} == {"GC408"}


def test_vector_quantisation_by_detach_passes_with_a_note():
    package = pytest.importorskip("vector_quantize_pytorch")

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 4)
            self.codebook = package.VectorQuantize(dim=4, codebook_size=8)

        def forward(self, x):
            return self.codebook(self.fc(x), freeze_codebook=True)[0]

    unit = judge(Quantised().train(), drawn(2, 5, 6))
    assert codes(unit, "error") == set()
    assert "GC404" in codes(unit, "note")
