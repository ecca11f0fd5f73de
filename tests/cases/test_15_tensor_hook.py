"""Case 15 (pytorch 56935, 91468): hooks that change the gradient on its way.

Meant, as far as anyone can tell, so they are set aside while checking and noted (GC409). What is wrong next to a hook
is still named. A hook that only looks on is a hook too.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Hooked(nn.Module):
    """Two layers with a hook on the value between them, if there is one."""

    def __init__(self, hook=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.hook = nn.Linear(6, 5), nn.Linear(5, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).tanh()
        if self.hook is not None and h.requires_grad:
            h.register_hook(self.hook)
        return self.fc2(h)


def ten_times(gradient: Tensor) -> Tensor:
    return 10 * gradient


def clip(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


@pytest.mark.parametrize("hook", [ten_times, clip])
def test_a_hook_on_an_intermediate_value_is_set_aside_and_noted(hook):
    unit = judge(Hooked(hook), X)
    assert_passes(unit)
    assert "GC409" in codes(unit)


def test_without_a_hook_there_is_no_note():
    unit = judge(Hooked(), X)
    assert_passes(unit)
    assert "GC409" not in codes(unit)


def test_a_mistake_behind_a_hook_is_named():
    unit = judge(plant(Hooked(ten_times), "fc1.weight", "scale 1.1"), X)
    assert wrong_tensors(unit) == ["param:fc1.weight"]


def test_a_hook_on_a_parameter_is_set_aside():
    model = Hooked()
    model.fc1.weight.register_hook(ten_times)
    assert_passes(judge(model, X))


def test_a_backward_hook_on_a_module_is_set_aside():
    model = Hooked()
    model.fc2.register_full_backward_hook(lambda module, to_input, to_output: (10 * to_input[0],))
    assert_passes(judge(model, X))


def test_a_forward_hook_is_part_of_the_function():
    model = Hooked()
    model.fc1.register_forward_hook(lambda module, args, output: 3 * output)
    unit = judge(model, X)
    assert_passes(unit)
    assert "GC409" not in codes(unit)
