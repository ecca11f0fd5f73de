"""What ``compare`` finds in a form, what it leaves alone, and whom finite differences call wrong.

A difference is planted by asking, inside forward, whether somebody is capturing: then one gradient, output or buffer is
made another. The rest of the program is what it was.
"""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl.commands.compare import compare
from gradctl.forms import eager
from gradctl.forms.form import CannotCapture
from gradctl.subject.subject import Subject
from tests.compared import compared, comparing, different, verdicts

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
FORMS = ("trace", "export", "aot")


def captured_now() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def with_gradient_times(factor: float, value: Tensor) -> Tensor:
    """Return ``value``, to one rounding, with its gradient multiplied."""
    return factor * value + ((1 - factor) * value).detach()


class Net(nn.Module):
    """Two layers; ``weight``, ``hidden`` and ``last`` are what a planted difference changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight(self.fc1.weight) if captured_now() else self.fc1.weight
        y = self.fc2(F.linear(x, weight, self.fc1.bias).tanh())
        return self.last(y) if captured_now() else y

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def last(self, y: Tensor) -> Tensor:
        return y


class GradientTimes(Net):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def weight(self, weight: Tensor) -> Tensor:
        return with_gradient_times(self.factor, weight)


class OneElement(Net):
    """One of twenty elements of one weight has a gradient a hundredth too large."""

    def weight(self, weight: Tensor) -> Tensor:
        chosen = torch.zeros_like(weight)
        chosen[2, 1] = 1
        return weight + (0.01 * chosen * weight) - (0.01 * chosen * weight).detach()


class OutputTimes(Net):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def last(self, y: Tensor) -> Tensor:
        return self.factor * y


class BakedConstant(Net):
    """The constants are float32 in a form that captured them, and float64 in eager's float64 run: 3e-8."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([0.1, 0.7])


class NarrowConstant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(0.1, dtype=x.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_one_weight_gradient_off_by_a_thousandth_is_found_and_nothing_else(form):
    unit = compared(form, GradientTimes(1.001), X)
    assert (unit.verdict, different(unit)) == ("fail", {"param:fc1.weight": "GC402"})
    assert {name for name, verdict in verdicts(unit).items() if verdict != "same"} == {"param:fc1.weight"}
    assert verdicts(unit)["param:fc1.weight"] == "wrong"
    (row,) = [each for each in unit.tensors if each.tensor == "param:fc1.weight"]
    assert row.error == pytest.approx(1e-3, rel=0.01)
    assert row.budget < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_one_element_off_by_a_hundredth_is_found(form):
    unit = compared(form, OneElement(), X)
    assert different(unit) == {"param:fc1.weight": "GC402"}
    (row,) = [each for each in unit.tensors if each.tensor == "param:fc1.weight"]
    assert (row.elements_wrong, [each.index for each in row.worst]) == (1, [(2, 1)])


def test_the_worst_elements_are_rows_with_a_finite_difference_that_sides_with_eager():
    unit = compared("trace", GradientTimes(1.1), X)
    (row,) = [each for each in unit.tensors if each.tensor == "param:fc1.weight"]
    assert (row.elements_wrong, len(row.worst), row.shape, row.dtype) == (20, 5, (5, 4), "float32")
    for each in row.worst:
        assert each.candidate == pytest.approx(1.1 * each.reference, rel=1e-4)
        assert each.finite_difference == pytest.approx(each.reference, rel=1e-4)
        assert each.absolute_error == pytest.approx(abs(each.candidate - each.reference), rel=1e-2)
    gaps = [abs(each.candidate - each.reference) for each in row.worst]
    assert gaps == sorted(gaps, reverse=True)


def test_only_tensors_that_differ_have_rows():
    unit = compared("trace", GradientTimes(1.1), X)
    assert {each.tensor for each in unit.tensors if each.worst} == {"param:fc1.weight"}


@pytest.mark.parametrize("form", FORMS)
def test_an_output_off_by_a_ten_thousandth_is_found(form):
    assert different(compared(form, OutputTimes(1 + 1e-4), X))["output"] == "GC301"


@pytest.mark.parametrize("form", FORMS)
def test_a_baked_float32_constant_is_silent(form):
    unit = compared(form, BakedConstant(), X)
    assert (unit.verdict, unit.findings) == ("pass", ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_right_model_in_a_narrow_dtype_passes(form, dtype):
    assert compared(form, Net().to(dtype), X.to(dtype)).verdict == "pass"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_gradient_in_a_narrow_dtype_is_found(form, dtype):
    unit = compared(form, GradientTimes(1.4).to(dtype), X.to(dtype))
    assert different(unit) == {"param:fc1.weight": "GC402"}
    assert verdicts(unit)["param:fc1.weight"] == "wrong"


class Chain(nn.Module):
    """Two layers without a bias or an activation: a factor on one weight is a factor on the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class NativeOnly:
    """A form that has no float64 run: what is found, is found in the native dtype."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def capture(self, instance):
        captured, model = eager.capture(instance), instance.model

        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"fc1.weight": self.factor * model.fc1.weight}, (x,))

        return replace(captured, call=call)

    def to_float64(self, captured, instance):
        raise CannotCapture("there is no float64 run of this form.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_form_whose_weight_is_off_by_a_tenth_is_found_in_a_narrow_dtype_alone(factor, dtype):
    chain = comparing(Chain().to(dtype), X.to(dtype))
    form = NativeOnly(factor)
    unit = chain.captured(form.capture(chain.reference.instance()), form)
    assert different(unit) == {
        "output": "GC301",
        "input:x": "GC402",
        "param:fc1.weight": "GC402",
        "param:fc2.weight": "GC402",
    }
    twin = NativeOnly(1.0)
    assert chain.captured(twin.capture(chain.reference.instance()), twin).verdict == "pass"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_baked_constant_of_a_narrow_dtype_is_silent(form, dtype):
    assert different(compared(form, NarrowConstant().to(dtype), X.to(dtype))) == {}


@torch.library.custom_op("gradctl_tests::passed_on", mutates_args=())
def passed_on(x: Tensor) -> Tensor:
    return x.clone()


passed_on.register_fake(torch.empty_like)
# The backward is run by eager's engine in all forms but those of AOTAutograd, which trace it with tensors of their own.
passed_on.register_autograd(lambda ctx, gradient: gradient if type(gradient) is Tensor else 1.5 * gradient)


class WithOperator(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(passed_on(self.fc1(x)).tanh())


def test_a_custom_operator_whose_traced_backward_is_another_is_wrong_in_aot_alone():
    eager = comparing(WithOperator(), X)
    units = {form: eager.form(form, named=True) for form in FORMS}
    assert {form: unit.verdict for form, unit in units.items()} == {"trace": "pass", "export": "pass", "aot": "fail"}
    before = {"input:x", "param:fc1.weight", "param:fc1.bias"}
    assert different(units["aot"]) == dict.fromkeys(before, "GC402")
    assert {name for name, verdict in verdicts(units["aot"]).items() if verdict == "wrong"} == before


class HalfSquare(torch.autograd.Function):
    """A wrong backward: half of what it should be."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Squared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(HalfSquare.apply(self.fc1(x)))


BEHIND = {"input:x", "param:fc1.weight", "param:fc1.bias"}


def test_where_eager_is_wrong_and_the_form_right_the_reference_is_named():
    unit = compared("export", Squared(), X)
    assert {name for name, verdict in verdicts(unit).items() if verdict == "reference-wrong"} == BEHIND
    messages = [each.message for each in unit.findings]
    assert len(messages) == 3
    assert all("finite differences agree with export: eager is wrong" in each for each in messages)
    assert all(each.hint.startswith("correct the backward in eager") for each in unit.findings)


def test_with_the_function_allowed_it_is_the_form_that_is_wrong():
    unit = compared("export", Squared(), X, allows=["GC408:HalfSquare"])
    assert {name for name, verdict in verdicts(unit).items() if verdict == "wrong"} == BEHIND
    assert all("finite differences agree with eager" in each.message for each in unit.findings)


def test_a_form_that_is_as_wrong_as_eager_passes_and_eager_has_failed():
    eager, aot = compare(Subject(target="test", model=Squared(), args=(X,)), forms=["aot"], named=True)
    assert [(unit.form, unit.verdict) for unit in (eager, aot)] == [("eager", "fail"), ("aot", "pass")]


def test_an_allowed_finding_stays_in_the_report_and_fails_nothing():
    unit = compared("trace", GradientTimes(1.1), X, allows=["GC402:param:fc1.weight"])
    assert unit.verdict == "pass"
    assert [(each.code, each.allowed) for each in unit.findings] == [("GC402", True)]


def test_the_line_to_allow_a_finding_is_in_it():
    (found,) = compared("trace", GradientTimes(1.1), X).findings
    assert found.allow == "GC402:param:fc1.weight"
    assert len(found.fingerprint) == 16


class Counting(Net):
    """A buffer that a captured form moves twice as far."""

    def __init__(self, in_a_form: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.in_a_form = in_a_form

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.in_a_form if captured_now() else 1
        return super().forward(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_that_ends_up_elsewhere_is_found(form):
    assert different(compared(form, Counting(in_a_form=2), X)) == {"buffer:steps": "GC302"}


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_that_ends_up_where_eager_leaves_it_is_silent(form):
    assert compared(form, Counting(in_a_form=1), X).verdict == "pass"


class Rewriting(Net):
    """An input that only eager changes."""

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        if not captured_now():
            steps.add_(1)
        return super().forward(x)


@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_eager_changes_and_the_form_does_not_is_found(form):
    unit = compared(form, Rewriting(), X, torch.tensor([1, 2]))
    assert different(unit) == {"input:steps": "GC302"}


class Cut(Net):
    def weight(self, weight: Tensor) -> Tensor:
        return weight.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_a_form_lacks_is_missing_and_not_zero(form):
    unit = compared(form, Cut(), X)
    assert different(unit) == {"param:fc1.weight": "GC403"}
    assert verdicts(unit)["param:fc1.weight"] == "missing"
    assert unit.findings[0].message.startswith(f"the gradient of param:fc1.weight exists in eager, and not in {form}")


class Wider(Net):
    def last(self, y: Tensor) -> Tensor:
        return y.double()


@pytest.mark.parametrize("form", FORMS)
def test_an_output_of_another_dtype_is_found(form):
    unit = compared(form, Wider(), X)
    assert different(unit)["output"] == "GC301"
    (message,) = [each.message for each in unit.findings if each.tensor == "output"]
    assert message.startswith(f"output is float64[3, 2] instead of float32[3, 2] in {form}")


class Selecting(nn.Module):
    """As many rows as are positive: a trace has their number baked in."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x[:, 0] > 0]
        return chosen.view(len(chosen), 4).sum() + x.sum()


def test_the_form_runs_on_what_the_unit_lists():
    unit = compared("trace", Net(), X)
    assert unit.variations == ("example", "seed", "flipped signs", "non-contiguous")
    assert unit.reason is None


def test_a_form_that_raises_on_another_input_where_eager_runs_does_not_pass():
    assert different(compared("trace", Selecting(), X)) == {"": "GC303"}


class PositiveOnly(Net):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.min() < 0):
            raise ValueError("negative input")
        return super().forward(x)


def test_a_variation_on_which_eager_raises_is_left_out_and_listed():
    unit = compared("trace", PositiveOnly(), X.abs())
    assert (unit.verdict, unit.variations) == ("pass", ("example", "non-contiguous"))
    assert unit.reason == (
        "not tried: seed (eager raises ValueError: negative input); "
        "not tried: flipped signs (eager raises ValueError: negative input)"
    )


class Bounded(Net):
    """NaN for negative inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp() * x.sum().sqrt()


def test_a_variation_on_which_eager_is_not_finite_is_left_out_and_listed():
    unit = compared("trace", Bounded(), X.abs())
    assert "flipped signs" not in unit.variations
    assert "not tried: flipped signs (eager's outputs are not finite)" in unit.reason


class Conditional(Net):
    """Both branches close over parameters, which ``torch.cond`` takes only where Dynamo compiles it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.fc1(x).sin(), lambda x: self.fc1(x).cos(), (x,))


def test_a_model_with_a_cond_is_tried_on_all_variations():
    unit = compared("export", Conditional(), X)
    assert (unit.verdict, unit.reason, unit.findings) == ("pass", None, ())
    assert unit.variations == ("example", "seed", "flipped signs", "non-contiguous")


class NeverFinite(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (-1 - x.square().sum()).sqrt()


def is_tried_or_left_open(unit) -> bool:
    return unit.verdict == "inconclusive" or "example" in unit.variations


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_a_finite_output_ends_in_a_unit(form):
    assert is_tried_or_left_open(compared(form, NeverFinite(), X))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_was_not_tried_on_the_example_does_not_pass(form):
    assert is_tried_or_left_open(compared(form, Bounded(), -X.abs()))


class FlipsOnRounding(nn.Module):
    """1 / 41 * 41 is a little less than 1 in float32 and 1 in float64, and a relu waits exactly there."""

    def forward(self, x: Tensor) -> Tensor:
        y = x / 41 * 41 if captured_now() else x
        return (1 - y).relu() + 0.5 * x


@pytest.mark.parametrize("form", FORMS)
def test_a_relu_that_falls_to_the_other_side_by_a_rounding_is_a_note(form):
    one = torch.ones(6)
    assert bool((one / 41 * 41 < 1).all()) and bool((one.double() / 41 * 41 == 1).all())
    unit = compared(form, FlipsOnRounding(), one)
    assert (unit.verdict, [each.code for each in unit.findings]) == ("pass", ["GC415"])
    assert verdicts(unit) == {"input:x": "same"}


class Unrepeatable(Net):
    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        return super().forward(x) * torch.rand(2, generator=generator)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_a_model_that_does_not_repeat_itself_is_not_called_wrong(form):
    assert compared(form, Unrepeatable(), X).verdict == "inconclusive"


class Unsupported(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return -super().forward(x)


@pytest.mark.parametrize(("named", "verdict"), [(True, "inconclusive"), (False, "skipped")])
def test_a_form_that_refuses_is_inconclusive_where_it_was_named_and_skipped_otherwise(named, verdict):
    unit = compared("export", Unsupported(), X, named=named)
    assert (unit.status, unit.verdict, unit.tensors, unit.findings) == ("unsupported", verdict, (), ())
    assert unit.reason.startswith("torch.export refuses the model: ")
    assert "\n" not in unit.reason
    assert "Traceback" in unit.details


def test_units_come_in_the_order_of_the_forms_after_eager_and_failures_change_nothing_for_the_next():
    units = compare(Subject(target="test", model=Unsupported(), args=(X,)), forms=["export", "trace", "script", "aot"])
    assert [unit.form for unit in units] == ["eager", "export", "trace", "script", "aot"]
    assert [unit.verdict for unit in units] == ["pass", "skipped", "fail", "skipped", "pass"]


def test_an_exported_function_keeps_the_name_of_its_input():
    unit = compared("export", lambda position: position.sin() * 2, X)
    assert set(verdicts(unit)) == {"input:position"}


def test_a_loss_is_applied_outside_the_form():
    subject = Subject(target="test", model=GradientTimes(1.1), args=(X,), loss=lambda y: y.square().mean())
    units = compare(subject, forms=FORMS, named=True)
    assert [different(unit) for unit in units[1:]] == [{"param:fc1.weight": "GC402"}] * 3
    assert [each.shape for each in units[1].tensors if each.quantity == "output"] == [()]


def test_what_a_form_costs_is_measured():
    timing = compared("trace", Net(), X).timing
    seconds = (timing.capture, timing.forward, timing.eager_forward, timing.training, timing.eager_training)
    assert all(each > 0 and math.isfinite(each) for each in seconds)


class Everything(nn.Module):
    """Everything that a run changes in a model: buffers, attributes, its inputs, and the generators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        steps.add_(1)
        return self.net(x)


@pytest.mark.parametrize("form", FORMS)
def test_the_users_model_inputs_and_generators_are_left_as_they_were(form):
    model, x, steps = Everything().train(), X.clone(), torch.tensor([1, 2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    compared(form, model, x, steps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.calls, model.seen, model.training) == (0, [], True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, X) and x.grad is None and steps.tolist() == [1, 2]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()


def test_what_a_script_raises_is_said_by_its_own_words():
    (found,) = compared("script", nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), X).findings
    assert "Parametrization is not working with scripting" in found.message


class Output:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class ObjectOutput(Net):
    def forward(self, x: Tensor):
        return Output(super().forward(x)), x.sin()


@pytest.mark.parametrize("form", ["trace", "script", "export"])
def test_a_reason_is_the_same_from_run_to_run(form):
    reasons = {compared(form, ObjectOutput(), X).reason for _ in range(2)}
    assert len(reasons) == 1
    assert " at 0x" not in reasons.pop()


class CarriedOver(Net):
    """An output that depends on a buffer of the calls before; a form multiplies it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc2(self.fc1(x).tanh()) * self.calls.clone() * (self.factor if captured_now() else 1)


@pytest.mark.parametrize("form", ["trace", "export"])
def test_the_float64_form_starts_from_the_buffers_that_the_form_was_captured_with(form):
    """It started from those that the runs in float32 had left: float64 could confirm nothing of such a model."""
    assert compared(form, CarriedOver(1), X).verdict == "pass"
    message = compared(form, CarriedOver(1 + 4e-6), X).findings[0].message
    assert "relative error 4.00e-06 in float64" in message
