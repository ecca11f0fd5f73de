"""Interpolation and reading by a grid, against torch's own kernels and autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing
from tests.sweeps import sampled

_SIZES: dict[str, list[dict[str, Any]]] = {
    "w": [
        {"size": (13,)},
        {"size": (4,)},
        {"size": (1,)},
        {"size": (7,)},
        {"scale_factor": 2},
        {"scale_factor": 1.7},
        {"scale_factor": 0.6},
        {"scale_factor": 0.6, "recompute_scale_factor": True},
    ],
    "hw": [
        {"size": (4, 13)},
        {"size": (1, 5)},
        {"scale_factor": 3},
        {"scale_factor": (1.7, 0.4)},
        {"scale_factor": (0.6, 2.3), "recompute_scale_factor": True},
    ],
    "dhw": [{"size": (6, 2, 9)}, {"scale_factor": (2, 1.3, 0.7)}],
}


_SMOOTH = {"w": ["linear"], "hw": ["bilinear", "bicubic"], "dhw": ["trilinear"]}


def _image(axes: str) -> Tensor:
    size = {"w": (7,), "hw": (5, 7), "dhw": (3, 5, 4)}[axes]
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _cases() -> list[Any]:
    cases = []
    for axes, sizes in _SIZES.items():
        for options in sizes:
            wanted = " ".join(str(each) for each in options.values())
            for mode in ("nearest", "nearest-exact"):
                cases.append(pytest.param(axes, {"mode": mode, **options}, id=f"{mode} {axes} {wanted}"))
            for mode in _SMOOTH[axes]:
                for corners in (False, True):
                    chosen = {"mode": mode, "align_corners": corners, **options}
                    cases.append(pytest.param(axes, chosen, id=f"{mode} {axes} {wanted} corners={corners}"))
                    if axes == "hw":
                        chosen = {**chosen, "antialias": True}
                        cases.append(pytest.param(axes, chosen, id=f"{mode} {axes} {wanted} corners={corners} smooth"))
    return cases


@pytest.mark.parametrize(("axes", "options"), _cases())
def test_outputs_lie_where_those_of_torch_do(axes: str, options: dict[str, Any]) -> None:
    operator = {
        "nearest": f"upsample_nearest{len(axes)}d",
        "nearest-exact": f"_upsample_nearest_exact{len(axes)}d",
    }.get(options["mode"], f"upsample_{options['mode']}{len(axes)}d")
    operator = f"_{operator}_aa" if options.get("antialias") else operator
    assert_as_torch({operator, f"{operator}_backward"}, lambda x: F.interpolate(x, **options), _image(axes))


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"), reason="torch had no Lanczos before 2.13")
@pytest.mark.parametrize("size", [(4, 13), (3, 3), (11, 2)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_lanczos_weighs_as_torch_does(size: tuple[int, int], align_corners: bool) -> None:
    assert_as_torch(
        {"_upsample_lanczos2d_aa", "_upsample_lanczos2d_aa_backward"},
        lambda x: torch.ops.aten._upsample_lanczos2d_aa(x, size, align_corners),
        _image("hw"),
    )


@pytest.mark.parametrize("scale", [1.1, 1.14, 2.1])
@pytest.mark.parametrize(
    ("axes", "mode"),
    [
        *(("w", mode) for mode in ("nearest", "nearest-exact", "linear")),
        *(("hw", mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")),
        *(("dhw", mode) for mode in ("nearest", "nearest-exact", "trilinear")),
    ],
)
def test_the_gradient_is_that_of_the_forward_where_torchs_kernels_differ(axes: str, mode: str, scale: float) -> None:
    image = _image(axes)[:1, :1]
    basis = torch.eye(image.numel(), dtype=torch.float64).reshape(-1, *image.shape[1:])
    columns = F.interpolate(basis, scale_factor=scale, mode=mode)  # linear: its matrix, a column a row
    cotangent = torch.randn(columns[:1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dims = len(axes)
    name = {"nearest": f"upsample_nearest{dims}d", "nearest-exact": f"_upsample_nearest_exact{dims}d"}
    backward = getattr(torch.ops.aten, f"{name.get(mode, f'upsample_{mode}{dims}d')}_backward").default
    corners = () if mode.startswith("nearest") else (False,)
    found = TABLE[backward](cotangent, cotangent.shape[2:], image.shape, *corners, *(scale,) * dims)
    torch.testing.assert_close(found.flatten(), columns.flatten(1) @ cotangent.flatten())


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("nearest", {"size": (4, 13)}),
        ("nearest-exact", {"scale_factor": 2}),
        ("bilinear", {"scale_factor": 2}),
        ("bicubic", {"size": (4, 13)}),
        ("antialiased", {"size": (4, 13)}),
    ],
)
def test_onnxruntime_interpolates_as_eager_does(options: dict[str, Any], mode: str) -> None:
    chosen = {"mode": "bicubic", "antialias": True} if mode == "antialiased" else {"mode": mode}
    assert differing(lambda x: F.interpolate(x, **chosen, **options), _image("hw").float()) == []


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

    assert_as_torch({"grid_sampler_2d", "grid_sampler_2d_backward"}, function, _random(2, 3, *size), places)


@pytest.mark.parametrize(("mode", "padding", "align_corners"), [each for each in _MODES if each[0] != "bicubic"])
def test_volumes_are_read_as_torch_reads_them(mode: str, padding: str, align_corners: bool) -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode, padding, align_corners)

    used = {"grid_sampler_3d", "grid_sampler_3d_backward"}
    assert_as_torch(used, function, _random(2, 3, 4, 3, 5), _random(2, 2, 3, 2, 3))


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 1, 4), (2, 3, 2, 4, 5), (2, 3, 1, 3, 1)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_affine_map_gives_the_places_that_torch_has(size: tuple[int, ...], align_corners: bool) -> None:
    axes = len(size) - 2
    assert_as_torch(
        {"affine_grid_generator"},
        lambda theta: F.affine_grid(theta, list(size), align_corners),
        _random(2, axes, axes + 1),
    )


def test_onnxruntime_transforms_an_image_as_eager_does() -> None:
    def transform(x: Tensor, theta: Tensor) -> Tensor:
        grid = F.affine_grid(theta, [2, 3, 4, 6], align_corners=False)
        return F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)

    assert differing(transform, _random(2, 3, 5, 4).float(), _random(2, 2, 3).float()) == []


@pytest.mark.parametrize("padding", sampled(["zeros", "border", "reflection"], 1))
def test_onnxruntime_reads_a_volume_as_eager_does(padding: str) -> None:
    def function(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, "bilinear", padding, align_corners=True)

    assert differing(function, _random(2, 3, 4, 3, 5).float(), _random(2, 2, 3, 2, 3).float()) == []
