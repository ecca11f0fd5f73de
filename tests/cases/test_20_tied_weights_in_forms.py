"""Case 20 (pytorch 147380): tied weights. A form that reports a gradient per name reports partial sums; added up by
storage they are eager's. Silent in every form, and a mistake in one of the two uses is still found.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.compared import causes, compared, different, verdicts

IDS = torch.tensor([[1, 4, 2], [0, 3, 3]])


class Tied(nn.Module):
    def __init__(self, in_a_form: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight
        self.in_a_form = in_a_form

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids).tanh()
        if self.in_a_form != 1 and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            weight = self.head.weight
            changed = self.in_a_form * weight + ((1 - self.in_a_form) * weight).detach()
            return nn.functional.linear(h, changed, self.head.bias)
        return self.head(h)


class OnOneStorage(Tied):
    """Two parameter objects on one storage, as loaders leave them."""

    def __init__(self, in_a_form: float = 1.0) -> None:
        super().__init__(in_a_form)
        self.head.weight = nn.Parameter(self.embedding.weight.detach())


@pytest.mark.parametrize("form", ["trace", "script", "export", "aot"])
@pytest.mark.parametrize("model", [Tied, OnOneStorage])
def test_tied_weights_are_the_same_in_every_form(model, form):
    unit = compared(form, model(), IDS)
    assert (unit.verdict, different(unit)) == ("pass", {}) or unit.status == "unsupported"
    assert unit.status == "unsupported" or set(verdicts(unit)) == {"param:embedding.weight", "param:head.bias"}


@pytest.mark.parametrize("form", ["trace", "export", "aot"])
@pytest.mark.parametrize("model", [Tied, OnOneStorage])
def test_a_mistake_in_one_of_the_two_uses_is_found(model, form):
    unit = compared(form, model(in_a_form=1.1), IDS)
    assert different(unit) == {"param:embedding.weight": "GC402"}
    assert verdicts(unit)["param:embedding.weight"] == "wrong"
    assert causes(unit) == {None}  # planted; the weights are tied in the form
