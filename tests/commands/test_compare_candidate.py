"""Another implementation beside the reference: the verdict on outputs, gradients, state, and on what does not fit."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import gradctl
from gradctl.core.errors import TargetError

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Scaled(torch.autograd.Function):
    """tanh with a gradient that is ``factor`` times the derivative."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x.tanh())
        ctx.factor = factor
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return ctx.factor * gradient * (1 - y * y), None


def right(x):
    return Scaled.apply(x, 1.0)


def wrong(x):
    return Scaled.apply(x, 1.1)


class Net(nn.Module):
    """Two layers around a batch norm; the names of the layers and the momentum can be chosen."""

    def __init__(self, up="up", down="down", momentum=0.1, middle=torch.tanh, bias=True):
        super().__init__()
        self.names, self.middle = (up, down), middle
        self.add_module(up, nn.Linear(5, 6, bias=bias))
        self.norm = nn.BatchNorm1d(6, momentum=momentum)
        self.add_module(down, nn.Linear(6, 5))

    def forward(self, x):
        up, down = (self.get_submodule(name) for name in self.names)
        return down(self.middle(self.norm(up(x))))


def compared(reference, candidate, inputs=X, **options):
    """Return the one unit of a comparison."""
    (unit,) = gradctl.compare(reference, inputs, candidate=candidate, **options).units
    return unit


def errors(unit):
    return {(each.code, each.tensor): each for each in unit.findings if each.severity == "error"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_right_candidate_passes_in_its_own_dtype(dtype):
    unit = compared(torch.tanh, right, X.to(dtype))
    assert unit.verdict == "pass"
    assert unit.form == "candidate"
    assert {each.tensor for each in unit.tensors} == {"output", "input:args.0"}
    assert not unit.findings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_backward_is_named_with_its_function_and_finite_differences_agree_with_the_reference(dtype):
    unit = compared(torch.tanh, wrong, X.to(dtype))
    assert unit.verdict == "fail"
    found = errors(unit)
    assert found["GC402", "input:args.0"].verdict == "wrong"
    assert found["GC402", "input:args.0"].cause == "GC408"
    assert next(each.message for each in unit.findings if each.code == "GC408").startswith("Scaled.backward is not")


def test_if_the_reference_is_wrong_the_candidate_is_said_to_be_right():
    report = gradctl.compare(wrong, X, candidate=torch.tanh)
    (row,) = [each for each in report.units[0].tensors if each.quantity == "gradient"]
    assert row.verdict == "reference-wrong"
    assert "right where the reference is wrong" in str(report)


def test_the_state_after_the_call_is_compared():
    unit = compared(Net(), Net(momentum=0.2))
    assert set(errors(unit)) == {("GC302", "buffer:norm.running_mean"), ("GC302", "buffer:norm.running_var")}


def test_the_innermost_module_that_differs_is_named():
    unit = compared(Net(), Net(momentum=0.2))
    assert errors(unit)["GC302", "buffer:norm.running_mean"].location.module == "norm"


def test_the_parameters_of_the_reference_are_copied_by_name_else_by_order_and_the_models_do_not_change():
    reference, candidate = Net(), Net(up="fc1", down="fc2")
    before = [each.detach().clone() for each in candidate.parameters()]
    unit = compared(reference, candidate)
    assert unit.verdict == "pass"
    assert [each.message for each in unit.findings if each.code == "GC124"] == [
        "paired by order and shape: up.weight=fc1.weight, up.bias=fc1.bias, down.weight=fc2.weight, down.bias=fc2.bias."
    ]
    assert all(torch.equal(*pair) for pair in zip(before, candidate.parameters(), strict=True))
    assert all(each.grad is None for each in (*reference.parameters(), *candidate.parameters()))


def test_a_map_names_partners():
    unit = compared(Net(), Net(up="fc1", down="fc2"), map={"up.*": "fc1.*", "down.*": "fc2.*"})
    assert unit.verdict == "pass"
    assert not [each for each in unit.findings if each.code == "GC124"]


def test_a_wrong_map_is_a_difference_in_outputs():
    first, second = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    assert compared(first, second).verdict == "pass"
    assert ("GC301", "output") in errors(compared(first, second, map={"0.weight": "1.weight", "1.weight": "0.weight"}))


def test_own_weights_are_kept_and_parameters_without_a_partner_are_noted():
    fused, apart = nn.Linear(5, 6, bias=False), nn.ModuleList([nn.Linear(5, 3, bias=False) for _ in range(2)])
    with torch.no_grad():
        fused.weight.copy_(torch.cat([each.weight for each in apart]))
    parts = Parts(apart)
    unit = compared(fused, parts, own_weights=True)
    assert unit.verdict == "pass"
    assert [each.message for each in unit.findings] == [
        "not compared, without a partner: param:weight, param:parts.0.weight, param:parts.1.weight."
    ]
    with pytest.raises(TargetError, match="parameters of the reference without a partner: weight; parameters of the"):
        compared(fused, parts)


class Parts(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1)


def test_a_candidate_in_another_dtype_is_compared_with_the_reference_in_that_dtype():
    unit = compared(Net(), Net().bfloat16())
    assert unit.verdict == "pass"
    assert {each.dtype for each in unit.tensors if each.quantity == "gradient"} == {"bfloat16"}
    assert [each.code for each in unit.findings] == ["GC126"]


def test_a_gradient_that_the_candidate_lost_is_missing():
    unit = compared(torch.tanh, lambda x: x.detach().tanh())
    assert ("GC403", "input:args.0") in errors(unit)


def test_an_output_that_is_wrong_by_less_than_the_rounding_of_bfloat16_is_found_in_float64():
    unit = compared(torch.tanh, lambda x: 1.0005 * x.tanh(), X.bfloat16())
    found = errors(unit)["GC301", "output"]
    assert "relative error 5.00e-04 in float64" in found.message


class OnlyBfloat16(torch.autograd.Function):
    """A sum over the last axis that accumulates in bfloat16, and takes nothing else."""

    @staticmethod
    def forward(ctx, x):
        assert x.dtype == torch.bfloat16
        ctx.shape = x.shape
        total = torch.zeros_like(x[..., 0])
        for part in x.unbind(-1):
            total = total + part
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient.unsqueeze(-1).expand(ctx.shape)


def test_a_candidate_that_refuses_float64_is_compared_in_its_own_dtype():
    unit = compared(lambda x: x.sum(-1), OnlyBfloat16.apply, torch.ones(8, 1024).bfloat16())
    assert ("GC301", "output") in errors(unit)
    assert any(each.code == "GC126" and "does not run in float64" in each.message for each in unit.findings)


def test_a_candidate_that_changes_its_input_is_reported():
    unit = compared(torch.relu, torch.relu_)
    assert [(each.code, each.tensor) for each in unit.findings if each.severity == "error"] == [
        ("GC302", "input:args.0")
    ]


def test_a_candidate_that_raises_on_other_values_is_reported():
    def positive(x):
        if x.flatten()[0] < 0:
            raise ValueError("negative")
        return x.tanh()

    inputs = X.clone()
    inputs[0, 0] = 1.0
    unit = compared(torch.tanh, positive, inputs)
    (found,) = [each for each in unit.findings if each.code == "GC303"]
    assert found.message.startswith("the candidate raises with seed, flipped signs, seed after example and ")
    assert found.message.endswith("where the reference runs: ValueError: negative.")


def test_a_candidate_that_differs_from_itself_is_inconclusive():
    unit = compared(torch.tanh, lambda x: x.tanh() + 1e-9 * time.time_ns() % 1)
    assert unit.verdict == "inconclusive"
    assert "differs from itself" in unit.reason


def test_a_reference_without_gradients_is_compared_by_outputs():
    unit = compared(lambda x: x + 1, lambda x: x - (-1), torch.arange(4))
    assert unit.verdict == "pass"
    assert [each.code for each in unit.findings] == ["GC126"]
    assert compared(lambda x: x + 1, lambda x: x - 1, torch.arange(4)).verdict == "fail"


def test_keyword_inputs_go_by_position_if_the_candidate_calls_them_otherwise():
    unit = compared(lambda x, y: x * y, lambda a, b: b * a, (), kwargs={"x": X, "y": X + 1})
    assert unit.verdict == "pass"
    assert {each.tensor for each in unit.tensors} == {"output", "input:x", "input:y"}


@pytest.mark.parametrize(
    ("candidate", "code", "said"),
    [
        (lambda x, y: x, "GC123", "missing a required argument: 'y'"),
        (lambda x: (x, x), "GC123", "returns output.0, output.1, and tanh output"),
        (lambda x: 1 / 0, "GC111", "raises on x=f32[4,5]: ZeroDivisionError"),
        (nn.Linear(5, 6), "GC124", "parameters of the candidate without a partner: weight, bias"),
        (3, "GC109", "the model is of type 'int'"),
        (nn.Linear, "GC109", "the model is the class 'Linear'"),
    ],
    ids=["signature", "structure", "raises", "parameters", "type", "class"],
)
def test_a_candidate_that_does_not_fit_is_one_sentence(candidate, code, said):
    with pytest.raises(TargetError) as caught:
        compared(torch.tanh, candidate)
    assert caught.value.code == code
    assert said in caught.value.message


def test_another_shape_of_the_output_is_a_difference():
    found = errors(compared(torch.tanh, lambda x: x.tanh()[0]))
    assert "float32[5] instead of float32[4, 5]" in found["GC301", "output"].message


def test_forms_and_a_candidate_exclude_each_other():
    with pytest.raises(TargetError, match="omit one of them"):
        compared(torch.tanh, right, forms="trace")


def test_the_smallest_size_that_differs_is_named():
    def faulty(x):
        return x.tanh() if len(x) < 4 else Scaled.apply(x, 1.1)

    unit = compared(torch.tanh, faulty, X[:2], sizes={"batch": [1, 2, 3, 4, 7]})
    found = next(each.message for each in unit.findings if each.code == "GC402")
    assert "The smallest size that differs is batch=4; the two agree at batch=1, at batch=2, at batch=3" in found
    assert compared(torch.tanh, right, X[:2], sizes={"batch": [1, 2, 3, 4, 7]}).verdict == "pass"


@pytest.mark.parametrize("kind", ["module", "function", "inside", "closure", "method"])
def test_a_candidate_that_uses_torch_compile_is_refused_since_its_copy_would_run_without_it(kind):
    net = Net()
    compiled = torch.compile(Net())
    if kind == "method":
        net.compile()
    candidate = {
        "module": compiled,
        "function": torch.compile(torch.tanh),
        "inside": nn.Sequential(compiled),
        "closure": lambda x: compiled(x) + 0,
        "method": net,
    }[kind]
    with pytest.raises(TargetError, match=r"uses torch\.compile, and the copy that is compared would run without it"):
        compared(torch.tanh, candidate)


def test_outputs_in_another_order_of_their_keys_agree():
    unit = compared(lambda x: {"a": x, "b": x.exp()}, lambda x: {"b": x.exp(), "a": x * 1})
    assert unit.verdict == "pass"


def test_a_parameter_that_the_reference_freezes_is_reported_if_the_candidate_trains_it():
    unit = compared(Net().requires_grad_(False), Net())
    assert ("GC403", "param:up.weight") in errors(unit)
    assert not [each for each in unit.findings if each.code == "GC419"]


class Dropout(nn.Module):
    """Dropout that draws in its own way."""

    def forward(self, x):
        return x * 2 * (torch.rand(x.shape) > 0.5) if self.training else x


def test_different_draws_of_dropout_differ_with_a_note_on_random_numbers_and_agree_in_evaluation_mode():
    unit = compared(nn.Dropout(), Dropout())
    assert unit.verdict == "fail"
    assert "random numbers are drawn" in next(each.message for each in unit.findings if each.code == "GC220")
    assert compared(nn.Dropout().eval(), Dropout().eval()).verdict == "pass"


def test_values_that_are_not_finite_in_both_are_an_error():
    def masked(x):
        return x.masked_fill(torch.ones_like(x, dtype=torch.bool), -torch.inf).softmax(-1)

    unit = compared(masked, masked)
    assert [each.code for each in unit.findings if each.severity == "error"] == ["GC407"]


class Detached(Net):
    def forward(self, x):
        return x.detach() + super().forward(x)


class Residual(Net):
    def forward(self, x):
        return x + super().forward(x)


def test_all_tensors_that_one_module_makes_wrong_are_one_cause():
    stack = nn.Sequential(Residual(), Residual(), Residual())
    unit = compared(stack, nn.Sequential(Residual(), Detached(), Residual()))
    causes = {each.cause_message for each in unit.findings if each.severity == "error"}
    assert causes == {"1 (Residual) of the candidate differs from the reference's if both are run alone."}
    assert len(errors(unit)) == 6  # of the first module and the input; up.bias has none, before a batch norm
