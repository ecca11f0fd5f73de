"""What an operator registers, tested by opcheck: what is false is found, although the gradients are right."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from gradctl.gradients.baseline import run_native
from gradctl.gradients.operator_contracts import operator_findings
from gradctl.subject.subject import Subject
from sample_models import custom_operator
from tests.judged import assert_passes, codes, finding, judge

LIBRARY = torch.library.Library("gradctl_contracts", "DEF")


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def operator(name, kernel, fake=torch.empty_like, backward=lambda ctx, gradient: 2 * gradient):
    """Return a custom operator; without ``fake`` or ``backward`` it registers none."""
    made = torch.library.custom_op(f"gradctl_contracts::{name}", kernel, mutates_args=(), schema="(Tensor x) -> Tensor")
    if fake is not None:
        made.register_fake(fake)
    if backward is not None:
        made.register_autograd(backward)
    return made


def mutating(x):
    y = 2 * x
    x.zero_()
    return y


right = operator("right", lambda x: 2 * x)
mutates = operator("mutates", mutating)
other_shape = operator("other_shape", lambda x: 2 * x, fake=lambda x: x.new_empty(x.shape[:1]))
other_dtype = operator("other_dtype", lambda x: 2 * x, fake=lambda x: torch.empty_like(x, dtype=torch.float16))
no_fake = operator("no_fake", lambda x: 2 * x, fake=None)
no_autograd = operator("no_autograd", lambda x: 2 * x, backward=None)


def refuses(x):
    raise ValueError("of no shape")


fake_raises = operator("fake_raises", lambda x: 2 * x, fake=refuses)

# An autograd.Function at the key of a device: right in eager mode, and gone in a captured graph.
LIBRARY.define("at_the_device(Tensor x) -> Tensor")
LIBRARY.impl("at_the_device", Twice.apply, "CPU")
LIBRARY.impl("at_the_device", torch.empty_like, "Meta")


class Net(nn.Module):
    """A linear layer, and an operator on its output that computes twice its input."""

    def __init__(self, called):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.called = nn.Linear(4, 3), called

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.fc(x))


def mutates_of(x):
    return mutates(x)


def right_of(x):
    return right(x)


def unit_of(called, **options):
    return judge(Net(called), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), **options)


@pytest.mark.parametrize("called", [right, torch.ops.gradctl_contracts.right], ids=["object", "packet"])
def test_an_operator_that_does_what_it_registers_is_silent(called):
    unit = unit_of(called)
    assert_passes(unit)
    assert "GC424" not in codes(unit)


@pytest.mark.parametrize(
    ("called", "severity", "said"),
    [
        (mutates, "error", "mutates: its schema is false (Argument x is not defined as mutable but was mutated)."),
        (other_shape, "error", "other_shape: its fake kernel returns other tensors than it does (Shapes torch.Size"),
        (other_dtype, "error", "other_dtype: its fake kernel returns other tensors than it does (Dtypes torch.float"),
        (
            torch.ops.gradctl_contracts.at_the_device.default,
            "error",
            "at_the_device: it registers no autograd kernel; its",
        ),
        (no_fake, "warning", "no_fake: it has no fake kernel: torch.compile and torch.export refuse it."),
        (fake_raises, "warning", "fake_raises: its fake kernel raises ValueError: of no shape."),
    ],
    ids=lambda case: getattr(case, "_name", None),
)
def test_what_an_operator_registers_wrongly_is_named(called, severity, said):
    found = finding(unit_of(called), "GC424")
    assert found.message.startswith(f"operator gradctl_contracts::{said}")
    name = said.partition(":")[0]
    assert (found.severity, found.allow) == (severity, f"GC424:gradctl_contracts::{name}")
    assert found.location.file.endswith("test_operator_contracts.py") and found.location.op.endswith(name)


def test_only_an_error_fails_and_can_be_allowed():
    assert unit_of(other_shape).verdict == "fail"
    assert unit_of(no_fake).verdict == "pass"
    allowed = unit_of(other_shape, allows=["GC424:gradctl_contracts::other_shape"])
    assert (allowed.verdict, finding(allowed, "GC424").allowed) == ("pass", True)


def test_a_custom_operator_without_autograd_is_an_error_of_the_model():
    with pytest.raises(Exception, match="GC111 .* no autograd formula was registered. Please use register_autograd"):
        unit_of(no_autograd)


def test_an_operator_that_is_called_without_gradients_needs_no_autograd():
    with_constant = Net(lambda x: x + no_autograd(x.detach()))
    assert "GC424" not in codes(judge(with_constant, torch.randn(5, 4)))


def test_the_arguments_are_those_of_the_call_that_is_differentiated():
    def twice_called(x):
        return right(other_shape(x[:, 0].detach()).unsqueeze(1) + other_shape(x))

    assert "torch.Size([5, 3])" in finding(judge(Net(twice_called), torch.randn(5, 4)), "GC424").message


def test_an_operator_in_a_branch_of_cond_is_tested():
    def branched(x):
        return torch.cond(x.sum() > -1e9, mutates_of, right_of, (x,))

    unit = judge(Net(branched), torch.randn(5, 4))
    assert "GC419" not in codes(unit)
    assert "mutates: its schema is false" in finding(unit, "GC424").message


def test_what_opcheck_itself_cannot_do_is_a_note():
    calls = itertools.count(1)

    def three_times(x):
        if next(calls) > 3:  # two runs of the model, and that in which the call is recorded
            raise ValueError("only so often")
        return 2 * x

    native = run_native(Subject("test", Net(operator("three_times", three_times)), (torch.randn(5, 4),)))
    (found,) = operator_findings(native)
    assert (found.severity, found.allow) == ("note", None)
    name = "operator gradctl_contracts::three_times"
    assert found.message == f"{name}: opcheck cannot test it: test_schema raises ValueError: only so often."


def test_opcheck_passes_a_backward_that_is_wrong_by_a_tenth_and_gradcheck_fails_it():
    arguments = tuple(x.requires_grad_() for x in custom_operator.soft_clip_inputs())
    assert set(torch.library.opcheck(custom_operator.soft_clip, arguments).values()) == {"SUCCESS"}
    unit = judge(custom_operator.Clipped(), *custom_operator.Clipped_inputs())
    assert "GC424" not in codes(unit)
    assert (
        "sample::soft_clip.backward is not the derivative in 'limit': off by 1.00e-01" in finding(unit, "GC408").message
    )
