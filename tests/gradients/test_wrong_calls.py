"""Where a gradient becomes wrong: the one call whose backward is not its derivative is named, and no other."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.judged import assert_passes, codes, finding, judge, wrong_tensors
from tests.zoo import plant

BY_FORWARD_MODE = "the backward (VJP) of {} is wrong, forward mode (JVP) agrees with finite differences."


class Overwriting(nn.Module):
    """Writes at an index that occurs twice: the value written last stands, and both sources get the gradient."""

    def __init__(self, index: list[int]) -> None:
        super().__init__()
        self.index = torch.tensor(index)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(4, dtype=x.dtype).scatter(0, self.index, x.sin())


class InPlace(Overwriting):
    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros(4, dtype=x.dtype)
        target[self.index] = x.sin()
        return target


TWICE, DISTINCT = [0, 2, 2], [0, 2, 1]


def between_layers(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), middle), nn.Linear(4, 2))


def places(unit):
    """Return module and operator of the place of each tensor that is wrong."""
    return {(each.location.module, each.location.op) for each in unit.findings if each.code == "GC401"}


def line_of(text: str, source: object) -> int:
    lines, first = inspect.getsourcelines(source)
    (offset,) = [number for number, line in enumerate(lines) if text in line]
    return first + offset


@pytest.mark.parametrize(
    ("part", "call", "op"),
    [(Overwriting, "scatter(", "torch.Tensor.scatter"), (InPlace, "] = x", "torch.Tensor.__setitem__")],
)
def test_a_wrong_call_is_named_with_module_and_line(part, call, op):
    unit = judge(between_layers(part(TWICE)), torch.randn(3))
    assert places(unit) == {("1.1", op)}
    found = next(each for each in unit.findings if each.code == "GC401")
    assert (found.location.file, found.location.line) == ("tests/gradients/test_wrong_calls.py", line_of(call, part))
    assert (found.cause, found.message.partition("): ")[2]) == (None, BY_FORWARD_MODE.format(op))


@pytest.mark.parametrize("part", [Overwriting, InPlace])
def test_the_same_call_at_distinct_indices_is_silent(part):
    assert_passes(judge(between_layers(part(DISTINCT)), torch.randn(3)))


def test_what_comes_after_the_wrong_call_has_its_right_gradient_and_no_place():
    unit = judge(between_layers(Overwriting(TWICE)), torch.randn(3))
    assert wrong_tensors(unit) == ["input:input", "param:0.bias", "param:0.weight"]


def test_each_tensor_gets_the_call_that_its_own_gradient_passes():
    torch.manual_seed(0)
    model = plant(
        plant(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), "0.bias", "sign", "native"),
        "2.weight",
        "scale 1.1",
        "native",
    )
    unit = judge(model, torch.randn(3, 4))
    modules = {each.tensor: each.location.module for each in unit.findings if each.code == "GC401"}
    assert modules == {"param:0.bias": "0", "param:2.weight": "2"}


def test_two_wrong_calls_on_one_path_are_both_named():
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = torch.tensor(TWICE)
            first = torch.zeros(3, dtype=x.dtype).scatter(0, index, x)
            return torch.zeros(3, dtype=x.dtype).index_put((index,), first.exp())

    found = finding(judge(Both(), torch.randn(3)), "GC401")
    assert "of torch.Tensor.scatter is wrong" in found.message
    assert "; the backward (VJP) of torch.Tensor.index_put is wrong" in found.message


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_wrong_call_is_named_inside_a_checkpoint(reentrant):
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(3, 3), Overwriting(TWICE)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    assert places(judge(Saving(), torch.randn(3))) == {("body", "torch.Tensor.scatter")}


def test_a_wrong_call_in_a_loop_is_named_once():
    class Recurrent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x + torch.zeros(3, dtype=x.dtype).scatter(0, torch.tensor(TWICE), x).sin()
            return x

    message = finding(judge(Recurrent(), torch.randn(3)), "GC401").message
    assert message.count("scatter") == 1


def test_dropout_around_a_wrong_call_draws_as_it_did():
    unit = judge(between_layers(nn.Sequential(nn.Dropout(0.1), Overwriting(TWICE), nn.Dropout(0.1))), torch.randn(3))
    assert places(unit) == {("1.1.1", "torch.Tensor.scatter")}


def test_a_scripted_leaf_is_named_as_a_module():
    model = between_layers(torch.jit.script(Scripted()))
    unit = judge(model, torch.randn(3))
    assert places(unit) == {("1.1", "RecursiveScriptModule")}


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(4, dtype=x.dtype).scatter(0, torch.tensor([0, 2, 2]), x)


@torch.library.custom_op("gradctl_tests::root", mutates_args=())
def root(x: Tensor) -> Tensor:
    return x.sqrt()


root.register_autograd(lambda ctx, gradient: gradient, setup_context=lambda ctx, inputs, output: None)


def test_a_registered_operator_is_named_with_its_module_and_no_call_besides():
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return root(x.exp())

    unit = judge(nn.Sequential(nn.Linear(3, 3), Root()), torch.randn(3))
    head = finding(unit, "GC408")
    assert (head.location.module, head.location.op) == ("1", "gradctl_tests::root")
    assert {each.cause for each in unit.findings if each.code == "GC401"} == {"GC408"}
    assert all("is wrong" not in each.message for each in unit.findings)


class Scaled(torch.autograd.Function):
    """x ↦ 3 x, with a factor for each mode."""

    @staticmethod
    def forward(ctx, x, backward_factor, forward_factor):
        ctx.factors = backward_factor, forward_factor
        return 3 * x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factors[0] * gradient, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return ctx.factors[1] * tangent


def a_call_before_a_function() -> nn.Module:
    """Return a net with a wrong call in its first layer, and a wrong Function between the layers."""

    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Scaled.apply(x, 2.0, 3.0)

    torch.manual_seed(0)
    return plant(nn.Sequential(nn.Linear(4, 4), Between(), nn.Linear(4, 4)), "0.weight", "sign", "native")


def test_a_wrong_function_and_a_wrong_call_are_both_named():
    unit = judge(a_call_before_a_function(), torch.randn(3, 4))
    head = finding(unit, "GC408").location
    assert (head.module, head.op) == ("1", "Scaled")
    causes = {each.tensor: (each.cause, each.location and each.location.op) for each in unit.findings if each.tensor}
    assert causes == {
        "param:0.weight": (None, "torch.Tensor.scatter"),
        "param:0.bias": ("GC408", None),
        "input:input": ("GC408", None),
    }


def test_an_allowed_function_is_no_culprit():
    unit = judge(a_call_before_a_function(), torch.randn(3, 4), allows=["GC408:Scaled"])
    assert places(unit) == {("0", "torch.Tensor.scatter")}


def test_padding_rows_and_straight_through_calls_are_no_culprits():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.end = nn.Embedding(5, 3, padding_idx=0), Overwriting(TWICE)

        def forward(self, index: Tensor) -> Tensor:
            rows = torch.fake_quantize_per_tensor_affine(self.table(index), 0.1, 0, -128, 127)
            return self.end(rows.sum(0))

    torch.manual_seed(0)
    assert places(judge(Embedded(), torch.tensor([0, 1, 4]))) == {("end", "torch.Tensor.scatter")}


@pytest.mark.parametrize(
    ("backward", "forward", "said"),
    [(2.0, 3.0, "its jvp agrees with finite differences."), (2.0, 2.0, "its jvp is wrong too.")],
)
def test_forward_mode_votes_on_a_wrong_function(backward, forward, said):
    unit = judge(lambda x: Scaled.apply(x, backward, forward).sin(), torch.randn(3))
    assert finding(unit, "GC408").message.endswith(f"(relative); {said}")


def test_a_wrong_jvp_alone_is_not_said_to_be_the_backward():
    assert codes(judge(lambda x: Scaled.apply(x, 3.0, 2.0).sin(), torch.randn(3))) == {"GC413"}


class Scaling(nn.Module):
    """Gives back what was saved for backward 1.1 times as large: each call alone is right."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 1.1 * t):
            return self.weight * x


def test_a_leaf_module_whose_calls_are_right_is_named_itself():
    torch.manual_seed(0)
    unit = judge(nn.Sequential(nn.Linear(3, 3), Scaling(), nn.Tanh()), torch.randn(3))
    assert places(unit) == {("1", "Scaling")}


def test_a_wrong_gradient_that_no_part_explains_keeps_the_module_of_its_parameter():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 1.1 * t):
                return self.second(self.first(x))

    torch.manual_seed(0)
    found = finding(judge(Around(), torch.randn(3), tensor="param:first.weight"), "GC401")
    assert (found.location.module, found.location.op) == ("first", None)
    assert found.message.endswith("e-01).")
