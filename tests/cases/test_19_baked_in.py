"""Case 19: what trace bakes in: the branch taken, a number read off a tensor, a property of the strides.

Right on the example, and wrong on another input; so forms are tried on more than the example. Script keeps the program,
aot compiles around it, export refuses or bakes. Twins: the same written with tensors.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).abs()
EVERYTHING = {"output": "GC301", **dict.fromkeys(("input:x", "param:fc.weight", "param:fc.bias"), "GC402")}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x) * 2
        return self.fc(x) * 3


class Selected(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.where(x.sum() > 0, 2.0, 3.0)


class Number(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * float(x.detach().max())


class Maximum(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * x.detach().max()


class Strides(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (2.0 if x.is_contiguous() else 3.0)


class OtherGradient(Net):
    """The same value in both branches, and half the gradient in one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if x.mean() < 0:
            h = 0.5 * h + (0.5 * h).detach()
        return h


BAKED: list[type[Net]] = [Branch, Number]
CAUSES = {Branch: "GC205", Number: "GC207"}
TWINS: list[type[Net]] = [Selected, Maximum]


@pytest.mark.parametrize("model", BAKED)
def test_trace_is_right_on_the_example_and_wrong_on_another_input(model: Callable[[], Net]):
    traced = torch.jit.trace(model(), (X,), check_trace=False)
    assert torch.equal(traced(X), model()(X))
    assert not torch.allclose(traced(-X), model()(-X))
    unit = compared("trace", model(), X)
    assert different(unit) == EVERYTHING
    assert all("with flipped signs" in each.message or "with seed" in each.message for each in unit.findings)
    assert causes(unit) == {CAUSES[model]}


@pytest.mark.parametrize("form", ["script", "aot"])
@pytest.mark.parametrize("model", BAKED)
def test_script_and_aot_keep_the_program(model: Callable[[], Net], form):
    assert compared(form, model(), X).verdict == "pass"


@pytest.mark.parametrize("model", BAKED)
def test_export_refuses_with_a_reason(model: Callable[[], Net]):
    unit = compared("export", model(), X)
    assert (unit.status, unit.verdict) == ("unsupported", "inconclusive")
    assert unit.reason.startswith(
        "torch.export refuses the model: a branch, a loop or a size depends on the values of a tensor"
    )


@pytest.mark.parametrize("form", ["trace", "export", "aot"])
@pytest.mark.parametrize("model", TWINS)
def test_written_with_tensors_every_form_is_right(model: Callable[[], Net], form):
    assert compared(form, model(), X).verdict == "pass"


@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_baked_property_of_the_strides_is_found(form):
    traced = torch.jit.trace(Strides(), (X,), check_trace=False)
    assert not torch.allclose(traced(X.t().contiguous().t()), Strides()(X.t().contiguous().t()))
    unit = compared(form, Strides(), X)
    assert (different(unit), causes(unit)) == (EVERYTHING, {"GC208"})


def test_a_baked_branch_that_changes_the_gradient_only_is_found():
    unit = compared("trace", OtherGradient(), X)
    assert different(unit) == {name: code for name, code in EVERYTHING.items() if name != "output"}
    assert causes(unit) == {"GC205"}
