"""Padding and its gradients, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradctl.joint.decompositions.padding import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

_SIZES = {1: (6,), 2: (5, 6), 3: (4, 5, 6)}


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "pads", [(1, 2, 4, 0, 2, 1), (0, 0, 3, 9, 0, 1), (-1, 2, 3, -2, -1, -1), (-2, -3, 1, 1, 0, -3)]
)
def test_what_is_copied_from_the_border_comes_back_to_it(dims: int, pads: tuple[int, ...]) -> None:
    used = {f"replication_pad{dims}d_backward"}
    image = _image(*_SIZES[dims])
    for each in (image, image[0], _image(*(1,) * dims) if min(pads) >= 0 else image):
        assert_as_torch(TABLE, used, lambda x: F.pad(x, pads[: 2 * dims], "replicate"), each)


def test_a_border_outside_what_is_left_is_not_translated() -> None:
    backward = TABLE[torch.ops.aten.replication_pad1d_backward.default]
    assert backward(torch.zeros(2, 3, 2), torch.zeros(2, 3, 4), (-5, 3)) is NotImplemented


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: F.pad(x, (1, 2, 0, 3), "replicate"), id="replicate"),
        pytest.param(lambda x: F.pad(x, (-1, 2, 3, -2), "replicate"), id="replicate-and-crop"),
        pytest.param(lambda x: F.pad(x, (1, 2, 3, 0), "reflect"), id="reflect"),
        pytest.param(lambda x: F.pad(x, (1, 2, 3, 0), "circular"), id="circular"),
        pytest.param(lambda x: F.pad(x, (-1, 2, 3, -2), value=1.5), id="constant-and-crop"),
        pytest.param(lambda x: F.unfold(x, (2, 3), 2, 1, 2), id="unfold"),
        pytest.param(lambda x: F.fold(x.flatten(1, 2)[:, :12], (3, 4), (2, 2), 1, 0, 1), id="fold"),
        pytest.param(nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate"), id="convolution"),
    ],
)
def test_onnxruntime_pads_as_eager_does(function: object) -> None:
    assert differing(function, _image(5, 6).float()) == []  # type: ignore[arg-type]
