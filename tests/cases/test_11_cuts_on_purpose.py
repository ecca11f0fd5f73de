"""Case 11: half of the gradient is cut by detach, item, float, tolist, data, or a block without gradients.

Autograd takes the cut value as a constant, and so do the finite differences: a pass, with a note (GC404) that has the
line. The same nets with one gradient scaled by 1.001 fail, so the note hides nothing.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant


def detach(h: Tensor) -> Tensor:
    return h.detach() * h


def data(h: Tensor) -> Tensor:
    return h.data * h


def item(h: Tensor) -> Tensor:
    return h.mean().item() * h


def items_one_by_one(h: Tensor) -> Tensor:
    return sum(element.item() for element in h[0]) * h


def python_float(h: Tensor) -> Tensor:
    return h / float(h.abs().max())


def tensor_of_a_float(h: Tensor) -> Tensor:
    return torch.tensor(float(h.mean())) * h


def tolist(h: Tensor) -> Tensor:
    return h / max(h.abs().flatten().tolist())


def numpy(h: Tensor) -> Tensor:
    return h * torch.from_numpy(h.detach().numpy() ** 2)


def no_grad_block(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.std() + h.amax()
    return h / scale


def set_grad_enabled(h: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        scale = h.square().sum()
    return h / scale


@torch.no_grad()
def temperature(h: Tensor) -> Tensor:
    return h.abs().mean()


def decorated_function(h: Tensor) -> Tensor:
    return h / temperature(h)


CUTS = (
    detach,
    data,
    item,
    items_one_by_one,
    python_float,
    tensor_of_a_float,
    tolist,
    numpy,
    no_grad_block,
    set_grad_enabled,
    decorated_function,
)


class Net(nn.Module):
    def __init__(self, cut) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.cut = nn.Linear(6, 5), nn.Linear(5, 3), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.cut(self.fc1(x).tanh()))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_cut_on_purpose_passes_with_a_note_that_has_the_line(cut):
    unit = judge(Net(cut), X)
    assert_passes(unit)
    files = {Path(each.location.file).name for each in unit.findings if each.code == "GC404"}
    assert files == {Path(__file__).name}


@pytest.mark.parametrize("cut", CUTS)
def test_a_note_can_be_asked_to_fail(cut):
    assert judge(Net(cut), X, fail_on="note").verdict == "fail"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("parameter", ["fc1.weight", "fc2.weight"])
def test_a_mistake_beside_the_cut_is_named(cut, parameter):
    unit = judge(plant(Net(cut), parameter, "scale 1.001"), X)
    assert wrong_tensors(unit) == [f"param:{parameter}"]


@pytest.mark.parametrize(
    "uncut",
    [
        lambda h: h * h,
        lambda h: h + torch.zeros_like(h),
        lambda h: torch.as_tensor(h) * 2,
        lambda h: h if h.sum() > 100 else 2 * h,
        lambda h: h + h.new_ones(1).detach(),
        lambda h: h * h.argmax().item(),
    ],
    ids=["product", "zeros_like", "as_tensor", "branch", "constant", "argmax"],
)
def test_what_cuts_nothing_gets_no_note(uncut):
    unit = judge(Net(uncut), X)
    assert_passes(unit)
    assert "GC404" not in codes(unit)
