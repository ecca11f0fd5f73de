"""What the calls of a form take: both parts of one training step, without a compilation of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.utils import counters

from gradctl.comparison.timing import timing_of
from gradctl.forms.compiled import aot
from gradctl.forms.onnx import forward as onnx_forward
from tests.compared import comparing

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_to_time_a_compiled_form_compiles_nothing():
    reference = comparing(nn.Linear(4, 4), X).reference
    captured = aot.capture(reference.instance())
    before = counters["stats"]["unique_graphs"]
    timing = timing_of(captured, reference)
    assert counters["stats"]["unique_graphs"] == before > 0
    assert 0 < timing.forward < timing.training
    assert 0 < timing.eager_forward < timing.eager_training


def test_a_form_without_gradients_is_timed_beside_a_forward_without_them():
    recorded = []

    class Net(nn.Linear):
        def forward(self, x):
            recorded.append(torch.is_grad_enabled())
            return super().forward(x)

    reference = comparing(Net(4, 4), X).reference
    captured = onnx_forward.capture(reference.instance())
    recorded.clear()
    timing = timing_of(captured, reference)
    assert set(recorded) == {False}
    assert timing.forward > 0
    assert timing.training is timing.eager_training is None
