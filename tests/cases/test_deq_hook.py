"""locuslab/deq 11, mdeq 8: an implicit gradient that is solved for in a tensor hook, right, and with its sign turned.

What a hook makes of a gradient cannot be judged by finite differences: the tensors behind it are counted apart, not as
agreeing. What it leaves alone is judged, and what is wrong without it is wrong.
"""

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, finding, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Equilibrium(nn.Module):
    def __init__(self, sign=1):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.u, self.out, self.sign = nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 3), sign
        with torch.no_grad():
            self.w.weight.mul_(0.5)

    def cell(self, z, x):
        return torch.tanh(self.w(z) + self.u(x))

    @staticmethod
    def solve(f, z):
        for _ in range(40):
            z = f(z)
        return z

    def forward(self, x):
        with torch.no_grad():
            z = self.solve(lambda z: self.cell(z, x), x.new_zeros(len(x), 6))
        z = self.cell(z, x)
        start = z.detach().requires_grad_()
        end = self.cell(start, x)

        def implicit(gradient):
            def step(y):
                return torch.autograd.grad(end, start, y, retain_graph=True)[0] + self.sign * gradient

            return self.solve(step, gradient)

        z.register_hook(implicit)
        return self.out(z)


BEHIND = ["input:x", "param:u.bias", "param:u.weight", "param:w.bias", "param:w.weight"]


def behind_hook(unit):
    return sorted(tensor.tensor for tensor in unit.tensors if tensor.verdict == "behind-hook")


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_behind_a_hook_is_counted_apart(sign):
    unit = judge(Equilibrium(sign), X)
    assert_passes(unit)
    assert behind_hook(unit) == BEHIND
    assert sorted(tensor.tensor for tensor in unit.tensors if tensor.verdict == "same") == [
        "param:out.bias",
        "param:out.weight",
    ]


def test_what_is_wrong_without_the_hook_is_wrong():
    unit = judge(plant(Equilibrium(), "u.weight", "scale 1.1"), X)
    assert wrong_tensors(unit) == ["param:u.weight"]


class Hooked(nn.Module):
    def __init__(self, hook=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.hook = nn.Linear(4, 6), nn.Linear(6, 3), hook

    def forward(self, x):
        h = self.a(x).tanh()
        if self.hook is not None:
            h.register_hook(self.hook)
        return self.b(h)


def test_a_hook_that_changes_nothing_leaves_all_judged():
    seen = []
    unit = judge(Hooked(lambda gradient: seen.append(gradient.norm())), X)
    assert_passes(unit)
    assert behind_hook(unit) == []
    assert finding(unit, "GC409").message.endswith("it changes no gradient here.")


def of_parameter(model):
    model.a.weight.register_hook(lambda gradient: 2 * gradient)
    return ["param:a.weight"]


def after_accumulation(model):
    def double(parameter):
        parameter.grad.mul_(2)

    model.a.weight.register_post_accumulate_grad_hook(double)
    return ["param:a.weight"]


def of_module(model):
    model.b.register_full_backward_hook(lambda module, to_input, to_output: (2 * to_input[0],))
    return ["input:x", "param:a.bias", "param:a.weight"]


@pytest.mark.parametrize("register", [of_parameter, after_accumulation, of_module])
def test_only_what_a_hook_changes_is_counted_apart(register):
    model = Hooked()
    expected = register(model)
    unit = judge(model, X)
    assert_passes(unit)
    assert behind_hook(unit) == expected


def test_a_gradient_scaled_by_frequency_is_counted_apart():
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 2))
    unit = judge(model, torch.tensor([1, 1, 2]))
    assert_passes(unit)
    assert behind_hook(unit) == ["param:0.weight"]
