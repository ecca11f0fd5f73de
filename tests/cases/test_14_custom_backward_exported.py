"""Case 14 (pytorch 113552): ``torch.export`` records a Function's forward and drops its backward.

Outputs stay equal. With the Function allowed, the export is wrong; without, finite differences take export's side.
Where eager's own backward is the mistake, export is right. Twin: a backward that is the derivative loses nothing.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different, gradients_of, verdicts
from tests.functions import Reversal, Square, StraightThrough

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
BEHIND = {"input:x", "param:before.weight", "param:before.bias"}
AFTER = {"param:after.weight", "param:after.bias"}


class WrongSquare(Square):
    """The factor 2 is forgotten."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Net(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.function = nn.Linear(6, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function.apply(self.before(x)))


@pytest.mark.parametrize(("function", "exported"), [(StraightThrough, 0.0), (Reversal, 1.0)])
def test_plain_torch_exports_another_gradient(function, exported):
    model = torch.export.export(_Only(function), (torch.ones(2),)).module()
    assert gradients_of(model, torch.ones(2))[0].tolist() == [exported] * 2


class _Only(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("function", [StraightThrough, Reversal])
def test_allowed_it_is_the_export_that_is_wrong(function):
    unit = compared("export", Net(function), X, allows=[f"GC408:{function.__name__}"])
    assert different(unit) == dict.fromkeys(BEHIND, "GC402")
    assert verdicts(unit) == {**dict.fromkeys(BEHIND, "wrong"), **dict.fromkeys(AFTER, "same")}
    assert causes(unit) == {"GC204"}


@pytest.mark.parametrize("function", [StraightThrough, Reversal, WrongSquare])
def test_not_allowed_finite_differences_side_with_the_export(function):
    unit = compared("export", Net(function), X)
    assert verdicts(unit) == {**dict.fromkeys(BEHIND, "reference-wrong"), **dict.fromkeys(AFTER, "same")}
    assert (unit.verdict, causes(unit)) == ("fail", {"GC204"})


@pytest.mark.parametrize("form", ["trace", "script", "aot"])
@pytest.mark.parametrize("function", [StraightThrough, Reversal, WrongSquare])
def test_a_form_that_keeps_the_backward_passes_whatever_the_backward_is(function, form):
    unit = compared(form, Net(function), X)
    assert (unit.verdict, different(unit)) == ("pass", {}) or unit.status == "unsupported"


@pytest.mark.parametrize("form", ["trace", "export", "aot"])
def test_a_backward_that_is_the_derivative_is_the_same_in_every_form(form):
    assert compared(form, Net(Square), X).verdict == "pass"
