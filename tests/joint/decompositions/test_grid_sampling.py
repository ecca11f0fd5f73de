"""Reading an image at given places, against torch's own kernels and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradctl.joint.decompositions.grid_sampling import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

_MODES = list(itertools.product(("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True)))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("mode", "padding", "align_corners"), _MODES)
@pytest.mark.parametrize(
    ("size", "places"),
    [
        pytest.param((5, 4), _random(2, 3, 4, 2) * 0.8, id="about"),
        pytest.param((5, 4), _random(2, 3, 4, 2) * 20, id="far"),
        pytest.param((1, 3), _random(2, 3, 4, 2), id="one-row"),
        # On elements and borders, where slopes jump: torch's choice of a side is taken.
        pytest.param((5, 5), (_random(2, 4, 4, 2) * 2).round() / 2, id="on-elements"),
    ],
)
def test_images_are_read_as_torch_reads_them(
    mode: str, padding: str, align_corners: bool, size: tuple[int, int], places: Tensor
) -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode, padding, align_corners)

    assert_as_torch(TABLE, {"grid_sampler_2d", "grid_sampler_2d_backward"}, function, _random(2, 3, *size), places)


@pytest.mark.parametrize(("mode", "padding", "align_corners"), [each for each in _MODES if each[0] != "bicubic"])
def test_volumes_are_read_as_torch_reads_them(mode: str, padding: str, align_corners: bool) -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode, padding, align_corners)

    used = {"grid_sampler_3d", "grid_sampler_3d_backward"}
    assert_as_torch(TABLE, used, function, _random(2, 3, 4, 3, 5), _random(2, 2, 3, 2, 3))


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 1, 4), (2, 3, 2, 4, 5), (2, 3, 1, 3, 1)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_affine_map_gives_the_places_that_torch_has(size: tuple[int, ...], align_corners: bool) -> None:
    axes = len(size) - 2
    assert_as_torch(
        TABLE,
        {"affine_grid_generator"},
        lambda theta: F.affine_grid(theta, list(size), align_corners),
        _random(2, axes, axes + 1),
    )


def test_onnxruntime_transforms_an_image_as_eager_does() -> None:
    def transform(x: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, [2, 3, 4, 6], align_corners=False)
        return F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)

    assert differing(transform, _random(2, 3, 5, 4).float(), _random(2, 2, 3).float()) == []


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_onnxruntime_reads_a_volume_as_eager_does(padding: str) -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, "bilinear", padding, align_corners=True)

    assert differing(function, _random(2, 3, 4, 3, 5).float(), _random(2, 2, 3, 2, 3).float()) == []
