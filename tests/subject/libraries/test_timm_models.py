"""``timm:NAME`` is a model of timm with images of the smallest size that it is made for.

Where timm cannot be imported (the extra ``timm``, which needs a torchvision that fits torch), a module with the two
functions that are used of it stands in: these tests then hold what is made of their results, not that timm has them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from gradctl.core.errors import GradctlError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.default_cfg = {"input_size": (3, 32, 32), "min_input_size": (3, 8, 8)}
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def create_model(name, pretrained=False, num_classes=10):
    assert not pretrained
    return Net(num_classes)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    try:
        importlib.import_module("timm")
    except ImportError:
        module = ModuleType("timm")
        module.__spec__ = ModuleSpec("timm", None)
        module.list_models, module.create_model = lambda: ["resnet18", "test_resnet", "test_vit"], create_model
        monkeypatch.setitem(sys.modules, "timm", module)


def loaded(target, **options):
    return load_subject(TargetOptions(target, **options))


def test_a_model_has_images_of_the_smallest_size():
    subject = loaded("timm:test_resnet", arguments=("num_classes=3",))
    made_for = subject.model.default_cfg
    assert subject.kwargs["x"].shape == (2, *(made_for.get("min_input_size") or made_for["input_size"]))
    assert not subject.model.training
    output = subject.model(**subject.kwargs)
    assert output.shape == (2, 3)
    assert output.requires_grad


def test_the_seed_draws_weights_and_images():
    first, again, other = loaded("timm:test_vit"), loaded("timm:test_vit"), loaded("timm:test_vit", seed=1)
    weights = [[*each.model.parameters()][-2] for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(first.kwargs["x"], again.kwargs["x"])
    assert not torch.equal(first.kwargs["x"], other.kwargs["x"])


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("timm:resnet81", {}, "GC125 timm has no model 'resnet81' (did you mean 'resnet"),
        ("timm:test_vit", {"arguments": ("colour=3",)}, "GC108 timm.create_model('test_vit') raised TypeError"),
    ],
)
def test_what_is_refused_and_how(target, options, said):
    with pytest.raises(GradctlError) as caught:
        loaded(target, **options)
    assert str(caught.value).startswith(said)
