"""Case 12 (functorch 79): a ``no_grad`` block in forward is lost in ``trace``: with x² under it, x * x² has the
gradient 3x² instead of x².

Script, export and aot keep it. ``detach`` says the same and is kept everywhere.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, comparing, different, gradients_of, verdicts

X = torch.tensor([3.0, -2.0])


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.square()
        return x * scale


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().detach()


class CutBesides(nn.Module):
    """The cut value is an output of its own; the one that is differentiated has nothing of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            statistic = x.exp()
        return x.sin(), statistic


def test_trace_loses_no_grad():
    traced = torch.jit.trace(Cut(), (X,), check_trace=False)
    assert gradients_of(Cut(), X)[0].tolist() == [9.0, 4.0]
    assert gradients_of(traced, X)[0].tolist() == [27.0, 12.0]
    unit = compared("trace", Cut(), X)
    assert different(unit) == {"input:x": "GC402"}
    assert verdicts(unit) == {"input:x": "wrong"}
    assert causes(unit) == {"GC201"}


@pytest.mark.parametrize("form", ["script", "export", "aot"])
def test_other_forms_keep_no_grad(form):
    assert compared(form, Cut(), X).verdict == "pass"


def test_detach_is_kept_in_every_form():
    eager = comparing(Detached(), X)
    assert [eager.form(form, named=True).verdict for form in ("trace", "script", "export", "aot")] == ["pass"] * 4


def test_an_output_that_asks_for_a_gradient_in_trace_only_is_a_difference():
    traced = torch.jit.trace(CutBesides(), (X,), check_trace=False)
    assert [each.requires_grad for each in CutBesides()(X.clone().requires_grad_())] == [True, False]
    assert [each.requires_grad for each in traced(X.clone().requires_grad_())] == [True, True]
    unit = compared("trace", CutBesides(), X)
    assert (unit.verdict, causes(unit)) == ("fail", {"GC201"})
