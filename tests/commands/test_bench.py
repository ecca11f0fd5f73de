"""What ``bench`` measures of one form: its numbers are consistent, and none changes a verdict. Speed is not tested."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradctl.commands.bench import bench_one, calls_to_pay, merged_batches
from gradctl.core.findings import Measurement, Unit
from gradctl.core.target_options import MeasuringOptions
from gradctl.subject.subject import Subject

BRIEF = MeasuringOptions(0.1)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Threshold(nn.Linear):
    """jit.trace keeps the branch of the example."""

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x[0, 0] > 0 else y


def subject_of(model, *args):
    return Subject(target="test", model=model, args=args or (X,))


def cost_of(unit):
    (cost,) = unit.measurements
    return cost


@given(
    st.floats(-1.0, 1e4),
    st.floats(1e-6, 10.0),
    st.floats(1e-6, 10.0),
)
def test_a_capture_has_paid_after_the_first_call_at_which_the_form_took_less(once, per_call, eager):
    calls = calls_to_pay(once, per_call, eager)

    def gain(count):
        return count * (eager - per_call) - once

    if calls is None:
        assert per_call >= eager
    else:
        rounding = 1e-9 * (abs(once) + calls * eager)
        assert gain(calls) > -rounding
        assert calls == 1 or gain(calls - 1) <= rounding


def test_the_count_is_exact_where_the_numbers_are():
    assert calls_to_pay(10.0, 0.5, 1.0) == 21  # after 20 calls both took 20 s
    assert calls_to_pay(-0.5, 0.5, 1.0) == 1
    assert calls_to_pay(0.0, 1.0, 1.0) is None


def test_the_numbers_of_a_form_are_consistent():
    cost = cost_of(unit := bench_one(subject_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), "export", BRIEF))
    assert (unit.verdict, cost.verdict, cost.sizes, unit.timing) == ("pass", "pass", None, None)
    assert cost.capture > 0 and cost.first_call > 0
    assert 0 < cost.forward.median < cost.training.median
    assert 0 < cost.eager_forward.median < cost.eager_training.median
    for each in (cost.forward, cost.training_ratio):
        assert each.lower <= each.median <= each.upper
    assert cost.rounds >= 6
    assert cost.seconds_measured <= cost.seconds_timing
    assert cost.loaded_bytes <= cost.peak_bytes
    assert cost.nodes == 2
    assert cost.artifact_bytes > 4 * (4 * 4 + 4)
    assert cost.graph_breaks is cost.recompilations is None


def test_eager_has_times_and_nothing_that_a_capture_has():
    cost = cost_of(bench_one(subject_of(nn.Linear(4, 4)), "eager", BRIEF))
    assert cost.training.median > cost.forward.median > 0
    assert cost.capture is cost.training_ratio is cost.artifact_bytes is cost.nodes is cost.pays_after is None


def test_a_wrong_form_fails_and_its_numbers_are_there():
    unit = bench_one(subject_of(Threshold(4, 4)), "trace", BRIEF)
    assert (unit.verdict, cost_of(unit).verdict) == ("fail", "fail")
    assert cost_of(unit).training_ratio is not None


def test_a_form_that_rejects_the_model_has_its_reason_and_no_numbers():
    class Text(nn.Linear):
        def forward(self, x, kind="a"):
            return super().forward(x)

    subject = Subject(target="test", model=Text(4, 4), args=(X,), kwargs={"kind": "b"})
    cost = cost_of(unit := bench_one(subject, "trace", BRIEF))
    assert (unit.status, cost.status) == ("unsupported", "unsupported")
    assert "accepts tensors only" in cost.reason
    assert cost.forward is None


def test_the_batch_size_is_that_of_axis_0():
    rows = []

    class Watched(nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    cost = cost_of(bench_one(subject_of(Watched(4, 4)), "eager", MeasuringOptions(0.1, batch=7)))
    assert (cost.sizes, set(rows)) == ("batch=7", {7})


def test_another_batch_size_compiles_again_and_the_note_has_the_line():
    unit = bench_one(subject_of(Threshold(4, 4)), "aot", MeasuringOptions(0.1, batch=2, other_batches=(5,)))
    cost = cost_of(unit)
    assert (cost.graph_breaks, cost.recompilations) == (1, 1)
    lines = Threshold.forward.__code__.co_firstlineno
    places = {each.code: (each.location.file, each.location.line - lines) for each in unit.findings}
    assert places["GC701"] == ("tests/commands/test_bench.py", 2)
    assert places["GC702"][0] == "tests/commands/test_bench.py"
    assert {each.severity for each in unit.findings} == {"note"}
    assert unit.verdict == "pass"


def test_inputs_that_the_model_changes_are_new_for_each_call():
    seen = []

    class InPlace(nn.Linear):
        def forward(self, x):
            seen.append(float(x[0, 0]))
            return super().forward(x.add_(1))

    assert cost_of(bench_one(subject_of(InPlace(4, 4)), "eager", BRIEF)).rounds >= 6
    assert len(seen) > 10 and all(math.isclose(each, float(X[0, 0]), rel_tol=1e-6) for each in seen[:10])


def test_a_function_without_parameters_has_gradients_of_its_inputs():
    cost = cost_of(bench_one(subject_of(torch.tanh), "export", BRIEF))
    assert cost.training.median > cost.forward.median


def test_a_model_that_raises_in_a_later_call_is_said_to_be_not_measured():
    class Worn(nn.Linear):
        calls = 0

        def forward(self, x):
            Worn.calls += 1
            if Worn.calls == 20:
                raise ValueError("worn out")
            return super().forward(x)

    cost = cost_of(bench_one(subject_of(Worn(4, 4)), "eager", BRIEF))
    assert cost.reason == "not measured: ValueError: worn out"
    assert cost.rounds == 0


@pytest.mark.parametrize(("small", "large", "whole"), [("pass", "pass", "pass"), ("pass", "inconclusive", None)])
def test_a_form_has_the_worst_verdict_of_its_batch_sizes_and_all_rows(small, large, whole):
    first = Measurement(sizes="batch=1", verdict=small)
    units = {
        "batch=1": Unit(target="net.py", form="aot", verdict=small, measurements=(first,)),
        "batch=8": Unit(target="net.py", form="aot", verdict=large, status="crashed", reason="signal 11"),
    }
    found = merged_batches(units)
    assert found.verdict == (whole or large)
    assert found.measurements[0] == first
    assert found.measurements[1] == Measurement(
        sizes="batch=8", verdict=large, status="crashed", reason="signal 11"
    )  # a process that ended measured nothing
