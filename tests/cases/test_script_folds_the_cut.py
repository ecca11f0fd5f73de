"""TorchScript folds ``x * 1`` into x, also where it stands under ``no_grad``: then x itself is what the cut was meant
to protect, and the gradient of x * (x * 1) is 2x instead of x. Found by gradctl on torch 2.13; script only.

Twin: an operation that cannot be folded keeps the cut.
"""

import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different, gradients_of, verdicts

X = torch.tensor([3.0, -2.0])


class Folded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x * 1
        return x * scale


class Kept(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x * 2
        return x * scale


def test_script_is_called_wrong_exactly_where_it_is():
    assert gradients_of(Folded(), X)[0].tolist() == [3.0, -2.0]
    is_wrong = gradients_of(torch.jit.script(Folded()), X)[0].tolist() != [3.0, -2.0]
    unit = compared("script", Folded(), X)
    assert different(unit) == ({"input:x": "GC402"} if is_wrong else {})
    assert verdicts(unit) == {"input:x": "wrong" if is_wrong else "same"}
    assert causes(unit) == ({"GC201"} if is_wrong else set())


def test_a_cut_that_cannot_be_folded_is_kept():
    assert compared("script", Kept(), X).verdict == "pass"
