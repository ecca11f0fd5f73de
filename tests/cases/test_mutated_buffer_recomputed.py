"""A buffer that forward adds to and then multiplies with: AOTAutograd computes the sum again in the backward, from the
buffer as the forward left it, and the gradient is one count too large. Found by gradctl on torch 2.13 (aot, compile).

Eager and trace are right, and so is the twin that only counts.
"""

import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import compare_one
from gradctl.subject.subject import Subject

X = torch.tensor([1.0, 2.0])


class Counted(nn.Module):
    def __init__(self, *, uses: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * (self.count if self.uses else 2)


def unit_of(form: str, *, uses: bool):
    return compare_one(Subject(target="counted", model=Counted(uses=uses), args=(X,)), form, named=True, allows=())


def plain_gradient(backend: str) -> list[float]:
    """Return the gradient that torch.compile leaves, without gradctl; [1, 1] is right."""
    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    torch.compile(Counted(uses=True), backend=backend)(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_aot_is_called_wrong_exactly_where_it_is():
    unit = unit_of("aot", uses=True)
    is_wrong = plain_gradient("aot_eager") != [1.0, 1.0]
    assert unit.verdict == ("fail" if is_wrong else "pass")
    assert [each.tensor for each in unit.findings if each.code == "GC402"] == (["input:x"] if is_wrong else [])
    assert {each.verdict for each in unit.tensors if each.tensor == "input:x"} == {"wrong" if is_wrong else "same"}


@pytest.mark.parametrize("form", ["trace", "aot", "export"])
def test_the_twin_that_only_counts_is_right_in_every_form(form):
    assert unit_of(form, uses=False).verdict == "pass"
