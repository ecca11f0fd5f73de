"""Static forms against eager: gradients that a form loses are named, and finite differences say who is right."""

import importlib
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import STATIC_FORMS, Comparing, compare, compare_one
from gradctl.core.allows import Allows
from gradctl.core.names import FORMS, RANK_FORMS
from gradctl.forms.table import form_named
from gradctl.gradients.baseline import run_native
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.subject import Subject
from tests.sweeps import sampled

RIGHT = ("mlp", "resnet", "tied_weights", "straight_through_detach", "custom_relu")


def subject_of(name: str) -> Subject:
    sample = importlib.import_module(f"sample_models.{name}")
    return Subject(target=name, model=sample.make_model(), args=sample.example_inputs())


def unit_of(subject: Subject, form: str, **options):
    return compare_one(subject, form, named=True, allows=options.pop("allows", ()), **options)


def wrong(unit) -> dict[str, str]:
    return {
        each.tensor: each.verdict for each in unit.tensors if each.quantity == "gradient" and each.verdict != "same"
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_its_file(form):
    assert callable(form_named(form).capture)


TAKING = ("trace", "script", "export", "aot", "onnx")


# Each sample and each form at least once.
@pytest.mark.parametrize(
    ("sample", "form"), sampled(product(RIGHT, TAKING), 3, always=[*zip(RIGHT, TAKING, strict=True)])
)
def test_a_right_sample_is_the_same_in_every_form_that_takes_it(sample, form):
    unit = unit_of(subject_of(sample), form)
    assert (unit.verdict, unit.findings) == ("pass", ()) or unit.status == "unsupported"


def test_export_loses_the_straight_through_gradient():
    unit = unit_of(subject_of("straight_through"), "export", allows=["GC408:RoundStraightThrough"])
    assert wrong(unit) == dict.fromkeys(("param:encoder.weight", "param:encoder.bias", "input:x"), "wrong")
    assert {each.verdict for each in unit.tensors if each.quantity == "output"} == {"same"}


def test_trace_loses_no_grad_and_finite_differences_side_with_eager():
    unit = unit_of(subject_of("no_grad_inside"), "trace")
    assert wrong(unit) == dict.fromkeys(("param:fc1.weight", "param:fc1.bias", "input:x"), "wrong")
    rows = next(each.worst for each in unit.tensors if each.tensor == "param:fc1.weight")
    assert all(abs(row.reference - row.finite_difference) < 1e-3 * abs(row.candidate) for row in rows)


class Hooked(nn.Module):
    """A hook multiplies the gradient by ten."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda gradient: 10 * gradient)
        return y * 2


@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_hook_that_a_form_drops_is_a_difference_that_nobody_can_judge(form):
    unit = unit_of(Subject(target="hooked", model=Hooked(), args=(torch.randn(3),)), form)
    assert wrong(unit) == {"input:x": "differs"}


def test_a_form_that_refuses_the_model_is_inconclusive_where_it_was_named_and_skipped_otherwise():
    subject = subject_of("control_flow")
    named, other = (compare_one(subject, "export", named=named, allows=()) for named in (True, False))
    assert (named.status, named.verdict, other.verdict) == ("unsupported", "inconclusive", "skipped")
    assert named.reason is not None and named.reason.startswith("torch.export refuses the model: ")


def test_eager_is_judged_first_and_then_each_form():
    units = compare(subject_of("linear"), forms=["trace", "script"])
    assert [unit.form for unit in units] == ["eager", "trace", "script"]
    assert units[1].variations == ("example", "seed", "flipped signs", "non-contiguous")
    assert set(STATIC_FORMS) == {*FORMS, *RANK_FORMS} - {"eager"}


def test_eager_has_one_baseline_in_a_command():
    """The two runs that show how a model takes its inputs serve its own check and the comparison of its forms."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            calls.append(1)
            return self.fc(x).tanh()

    def count(run):
        calls.clear()
        run()
        return len(calls)

    calls = []
    subject = Subject(target="test", model=Counted(), args=(torch.randn(4, 3),))
    alone = count(lambda: gradcheck(subject)) + count(lambda: Comparing(subject, Allows(())))
    baseline = count(lambda: run_native(subject))
    assert baseline >= 2
    assert count(lambda: compare(subject, forms=())) == alone - baseline


def test_each_unit_is_told_as_soon_as_it_is_complete():
    told = []
    subject = Subject(target="test", model=nn.Linear(3, 2), args=(torch.randn(4, 3),))
    units = compare(subject, forms=("trace", "export"), on_unit=lambda unit: told.append(unit.form))
    assert told == [unit.form for unit in units] == ["eager", "trace", "export"]
