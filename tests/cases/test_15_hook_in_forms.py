"""Case 15 (pytorch 56935, 91468): ``register_hook(lambda g: 10 * g)`` in forward is dropped by trace and export.

Nobody can say who is right: finite differences know nothing of hooks. aot keeps it. Twin: no hook.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different, gradients_of, verdicts

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
BEHIND = {"input:x", "param:fc1.weight", "param:fc1.bias"}


class Hooked(nn.Module):
    def __init__(self, factor: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.factor = nn.Linear(6, 5), nn.Linear(5, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x).tanh()
        factor = self.factor
        if factor is not None and h.requires_grad:
            h.register_hook(lambda gradient: factor * gradient)
        return self.fc2(h)


def test_plain_torch_drops_the_hook():
    eager, exported = Hooked(10), torch.export.export(Hooked(10), (X,)).module()
    assert torch.allclose(gradients_of(eager, X)[0], 10 * gradients_of(exported, X)[0])


@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_dropped_hook_is_a_difference(form):
    unit = compared(form, Hooked(10), X)
    assert different(unit) == dict.fromkeys(BEHIND, "GC402")
    assert {name for name, verdict in verdicts(unit).items() if verdict == "differs"} == BEHIND
    assert causes(unit) == {"GC203"}


def test_aot_keeps_the_hook():
    assert compared("aot", Hooked(10), X).verdict == "pass"


def test_script_refuses_the_hook():
    unit = compared("script", Hooked(10), X)
    assert (unit.status, unit.verdict) == ("unsupported", "inconclusive")


@pytest.mark.parametrize("form", ["trace", "export", "aot"])
def test_without_a_hook_every_form_is_right(form):
    assert compared(form, Hooked(None), X).verdict == "pass"


def with_module_hook() -> nn.Module:
    model = Hooked(None)
    model.fc1.register_full_backward_hook(lambda module, to_input, to_output: (10 * to_input[0],))
    return model


def test_a_backward_hook_on_a_module_is_refused_by_trace_dropped_by_export_and_kept_by_aot():
    assert compared("trace", with_module_hook(), X).status == "unsupported"
    exported = compared("export", with_module_hook(), X)
    assert (different(exported), causes(exported)) == ({"input:x": "GC402"}, {"GC203"})
    assert compared("aot", with_module_hook(), X).verdict == "pass"
