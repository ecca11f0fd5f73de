"""Inputs that share memory, with themselves or with others: one leaf, whose gradient is that of all its places."""

import pytest
import torch
from torch import Tensor, nn

from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from tests.judged import assert_passes, judge, wrong_tensors

ALL = torch.randn(24, generator=torch.Generator().manual_seed(1))


class WrongIf(torch.autograd.Function):
    """sin, with twice its gradient for inputs of a certain layout."""

    @staticmethod
    def forward(ctx, x, is_hit):
        ctx.save_for_backward(x)
        ctx.factor = 2 if is_hit(x) else 1
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient * ctx.saved_tensors[0].cos(), None


def sine_of(is_hit):
    return lambda x: WrongIf.apply(x, is_hit)


LAYOUTS = {
    "expanded": (ALL[:4].view(1, 4).expand(6, 4), lambda x: 0 in x.stride()),
    "expanded inside": (ALL[:6].view(2, 1, 3).expand(2, 4, 3), lambda x: 0 in x.stride()),
    "windows": (ALL.unfold(0, 6, 3), lambda x: x.stride() == (3, 1)),
    "scalar": (ALL[0].expand(5), lambda x: x.stride() == (0,)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_function_that_is_wrong_for_a_layout_is_found_with_an_input_of_that_layout(name):
    given, is_hit = LAYOUTS[name]
    assert wrong_tensors(judge(sine_of(is_hit), given)) == ["input:x"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_clean_twin_is_silent(name):
    assert_passes(judge(sine_of(lambda x: False), LAYOUTS[name][0]))
    assert_passes(judge(lambda x: x.sin() * torch.arange(x.numel()).view(x.shape), LAYOUTS[name][0]))


def test_two_views_of_one_memory_are_one_leaf_that_is_perturbed_once():
    unit = judge(lambda x, y: x.sin() * y.cos().flip(0), ALL[:6], ALL[3:9])
    assert_passes(unit)
    assert [row.tensor for row in unit.tensors] == ["input:x"]
    assert unit.tensors[0].shape == (9,)


def test_a_program_that_writes_to_one_view_sees_it_in_the_other():
    def model(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return y.sin()

    given = ALL[:6], ALL[3:9]
    expected = [each.clone() for each in given]
    assert_passes(judge(model, *given))
    assert all(torch.equal(each, before) for each, before in zip(given, expected, strict=True))
    memory = ALL[:9].clone()
    (_, output), *_ = Instance(Subject(target="test", model=model, args=given), input_mode="clone").run()
    assert torch.equal(output, model(memory[:6], memory[3:9]))


def test_views_without_an_element_in_common_are_leaves_of_their_own():
    columns = ALL.view(12, 2).unbind(1)
    unit = judge(lambda x, y: x * y, *columns)
    assert_passes(unit)
    assert [row.tensor for row in unit.tensors] == ["input:x", "input:y"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() @ self.weight.T


class TwiceTheWeight(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return WrongIf.apply(x, lambda _: True) @ self.weight.T


def test_an_input_that_views_a_parameter_is_a_part_of_its_leaf():
    model = Tied()
    unit = judge(model, model.weight.detach()[1:3])
    assert_passes(unit)
    assert [row.tensor for row in unit.tensors] == ["param:weight"]
    wrong = TwiceTheWeight()
    assert wrong_tensors(judge(wrong, wrong.weight.detach()[1:3])) == ["param:weight"]


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("mode", ["leaf", "clone", "constant"])
def test_each_mode_and_dtype_keeps_the_strides_of_an_expanded_input(dtype, mode):
    given = ALL[:4].to(dtype).view(1, 4).expand(6, 4)
    subject = Subject(target="test", model=lambda x, y: x * y, args=(given, ALL[:4]))
    (x, _), _ = Instance(subject, input_mode=mode).inputs()
    assert x.stride() == given.stride() and torch.equal(x, given)
