"""``timm:NAME`` is a model of timm with images of the smallest size that it is made for."""

from __future__ import annotations

import pytest
import torch

from gradctl.core.errors import GradctlError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject

timm = pytest.importorskip("timm", reason="needs the extra timm")


def loaded(target, **options):
    return load_subject(TargetOptions(target, **options))


def test_a_model_has_images_of_its_size():
    subject = loaded("timm:test_resnet", arguments=("num_classes=3",))
    assert subject.kwargs["x"].shape[:2] == (2, 3)
    assert not subject.model.training
    output = subject.model(**subject.kwargs)
    assert output.shape == (2, 3)
    assert output.requires_grad


def test_the_seed_draws_weights_and_images():
    first, again, other = loaded("timm:test_vit"), loaded("timm:test_vit"), loaded("timm:test_vit", seed=1)
    weights = [next(each.model.parameters()) for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
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
