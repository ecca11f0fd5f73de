"""Forms at other sizes and layouts: what is wrong at some of them only, and the clean twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradctl
from gradctl.commands.compare_sizes import compare_at_sizes, compare_one_at_sizes
from gradctl.core.allows import Allows
from gradctl.subject.inputs.sizes import parse_sizes
from gradctl.subject.loading.load import make_subject


class Scripted(nn.Linear):
    """Another function in TorchScript, from some batch on."""

    def __init__(self, wrong_from: int):
        super().__init__(4, 3)
        self.wrong_from = wrong_from

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self.weight, self.bias).tanh()
        if torch.jit.is_scripting() and x.shape[0] >= self.wrong_from:
            y = 1.1 * y
        return y


class Traced(nn.Linear):
    """Another function in a trace, for some batches."""

    def __init__(self, wrong_at=()):
        super().__init__(4, 3)
        self.wrong_at = wrong_at

    def forward(self, x):
        factor = 1.1 if torch.jit.is_tracing() and int(x.shape[0]) in self.wrong_at else 1.0
        return super().forward(x).tanh() * factor


class Branching(nn.Linear):
    """A batch above 3 takes another branch, in every form that is captured at that size."""

    def forward(self, x):
        return super().forward(x).sin() if x.shape[0] > 3 else super().forward(x).cos()


class Compiled(nn.Linear):
    """Another function if compiled and given a transposed input."""

    def __init__(self, is_wrong):
        super().__init__(4, 3)
        self.is_wrong = is_wrong

    def forward(self, x):
        is_transposed = x.stride(0) < x.stride(1)
        factor = 1.1 if torch.compiler.is_compiling() and self.is_wrong and is_transposed else 1.0
        return super().forward(x).tanh() * factor


def judged(model, form, text="batch=1,3,4,7"):
    torch.manual_seed(0)
    subject = make_subject(model, torch.randn(2, 4))
    return compare_one_at_sizes(subject, form, parse_sizes(text), limit=12, allows=())


def places(unit):
    """Return where the findings of a unit occur, without repetitions."""
    messages = [finding.message for finding in unit.findings if finding.severity == "error"]
    return {message.partition(" Found ")[2] for message in messages}


def test_a_script_that_is_wrong_from_batch_4_on_is_found():
    unit = judged(Scripted(4), "script")
    assert unit.verdict == "fail"
    (place,) = places(unit)
    assert place == (
        "at batch=4; batch=4, strided; batch=7; batch=7, offset storage, not at example; batch=1; batch=3; "
        "batch=3, transposed; batch=3, expanded cotangent."
    )
    assert next(row.shape for row in unit.tensors if row.tensor == "output") == (4, 3)


def test_the_script_that_is_right_passes_at_all_sizes():
    unit = judged(Scripted(100), "script")
    assert (unit.verdict, unit.reason) == ("pass", None)
    assert unit.variations[:4] == ("example", "seed", "flipped signs", "non-contiguous")
    assert len(unit.variations) == 4 + 4 + 4
    assert unit.timing is not None


def test_a_trace_that_is_wrong_at_the_largest_size_is_found():
    unit = judged(Traced(wrong_at=[7]), "trace")
    assert unit.verdict == "fail"
    assert {place.partition(", not at ")[0] for place in places(unit)} == {"at batch=7; batch=7, offset storage"}


def test_a_trace_is_tried_at_the_smallest_a_middle_and_the_largest_size_and_in_each_layout():
    unit = judged(Traced(), "trace", "batch=1,3,4,5,7")
    assert unit.verdict == "pass"
    assert unit.variations[4:] == (
        "batch=1",
        "batch=3, transposed",
        "batch=4",
        "batch=4, strided",
        "batch=5, offset storage",
        "batch=7",
        "batch=7, expanded cotangent",
    )


@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_form_with_fixed_sizes_is_captured_anew(form):
    unit = judged(Branching(4, 3), form, "batch=1,7")
    assert unit.verdict == "pass", [finding.message for finding in unit.findings]


@pytest.mark.parametrize("is_wrong", [True, False])
@pytest.mark.parametrize("form", ["aot", pytest.param("compile", marks=pytest.mark.slow)])
def test_what_is_compiled_is_tried_with_a_transposed_input(form, is_wrong):
    unit = judged(Compiled(is_wrong), form, "batch=3,7")
    assert unit.verdict == ("fail" if is_wrong else "pass"), unit.reason
    found = {place.partition(", not at ")[0] for place in places(unit)}
    assert found == ({"at batch=3, transposed"} if is_wrong else set())


def test_a_form_that_fails_on_the_example_is_not_tried_elsewhere():
    unit = judged(Traced(wrong_at=[2]), "trace")
    assert unit.verdict == "fail"
    assert unit.variations == ("example", "seed", "flipped signs", "non-contiguous")
    assert places(unit) == {""}


def test_sizes_that_eager_or_a_form_refuses_are_not_tried():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[0] == 1 or (x.shape[0] == 7 and torch.jit.is_tracing()):
                raise ValueError("not this batch")
            return super().forward(x)

    unit = judged(Picky(4, 3), "trace", "batch=1,3,7")
    assert unit.verdict == "pass"
    assert unit.reason.startswith("not tried: batch=1 (Picky raises on x=f32[1,4]: ValueError: not this batch); ")
    assert "not tried: batch=7; batch=7, strided; batch=7, expanded cotangent (" in unit.reason
    assert "batch=3" in unit.variations


def test_eager_is_checked_at_all_sizes_first():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return (2.0 if gradient.shape[0] < 4 else 3.0) * gradient

    done, said = [], []
    subject = make_subject(Wrong, torch.randn(2, 4))
    units = compare_at_sizes(
        subject,
        parse_sizes("batch=1,4"),
        forms=["trace"],
        allows=Allows(()),
        progress=said.append,
        on_unit=done.append,
    )
    assert (units[0].form, units[0].verdict) == ("eager", "fail")
    assert done == units
    assert any(text.startswith("1 of 6 sizes, batch=1: ") for text in said)
    assert "trace, 1 of 6 sizes, batch=1" in said


class Scaled(torch.autograd.Function):
    """Twice the input; the backward is wrong from batch 4 on."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return (2.0 if gradient.shape[0] < 4 else 3.0) * gradient


def doubled(x):
    return 2 * x


@pytest.mark.parametrize(("candidate", "verdict"), [(Scaled, "fail"), (torch.nn.Identity(), "fail"), (doubled, "pass")])
def test_another_implementation_runs_at_each_size(candidate, verdict):
    report = gradctl.compare(doubled, torch.randn(2, 3), candidate=candidate, sizes={"batch": [1, 3, 4, 7]})
    (unit,) = report.units
    assert unit.verdict == verdict
    assert {"batch=1", "batch=3", "batch=4", "batch=7", "batch=3, transposed"} <= set(unit.variations)
    smallest = [each.message.partition("The smallest size that differs is ")[2] for each in unit.findings]
    if candidate is Scaled:
        assert {text.partition(";")[0] for text in smallest} == {"batch=4"}


def test_a_size_that_the_reference_refuses_is_not_tried_with_another_implementation():
    def even(x):
        return x.reshape(-1, 2, 3).sin()

    report = gradctl.compare(even, torch.randn(2, 3), candidate=even, sizes="batch=3,4")
    assert report.verdict == "pass"
    assert "not tried: batch=3 (the reference raises RuntimeError: " in report.units[0].reason
    assert "batch=4" in report.units[0].variations
