"""What the calls of a form take: both parts of one training step, without a compilation of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo.utils import counters

from gradctl.comparison.timing import Step, medians_of, rounds_of, timing_of
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


def test_calls_in_which_the_system_took_the_core_do_not_count_if_there_are_others():
    quiet, loud = Step(1.0, 3.0), Step(50.0, 90.0, is_disturbed=True)
    blocks = [[quiet, loud, loud], [loud, loud], [quiet]]
    assert medians_of(blocks, "training") == [3.0, 90.0, 3.0]
    assert medians_of(blocks, "forward") == [1.0, 50.0, 1.0]


def test_rounds_are_in_turn_each_in_the_reverse_order_of_the_last():
    order = []
    rounds = rounds_of([lambda: order.append("a"), lambda: order.append("b")], fewest=3, most=3, seconds=60)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first pair warms up
    assert [len(blocks) for blocks in rounds] == [3, 3]


def test_a_block_has_a_call_at_least_and_a_round_is_not_begun_after_the_end():
    calls = []
    (blocks,) = rounds_of([lambda: calls.append(1)], fewest=2, most=9, seconds=0.0, block_seconds=0.0)
    assert [len(block) for block in blocks] == [1, 1]
