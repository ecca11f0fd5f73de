"""Gradients of convolutions, by each formula, and of padding, against autograd; and through onnxruntime."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

_BACKWARD = {"convolution_backward"}


# Sizes of the images: with strides of 2 and 3 the last rows are read, and not.
_SIZES = {1: [(8,), (11,)], 2: [(8, 7), (9, 11)], 3: [(5, 7, 6)]}


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_every_option_are_those_of_torch(dims: int, groups: int, kernel: int, transposed: bool) -> None:
    weight = _drawn(6, 6 // groups, *[kernel] * dims)
    for size, stride, padding, dilation in itertools.product(_SIZES[dims], (1, 2, 3), (0, 1, 2), (1, 2)):
        for rest in range(max(stride, dilation)) if transposed else (0,):

            def convolution(
                x: Tensor, w: Tensor, b: Tensor, options: tuple[int, ...] = (stride, padding, dilation, rest)
            ) -> Tensor:
                each = [[option] * dims for option in options]
                return torch.ops.aten.convolution(x, w, b, *each[:3], transposed, each[3], groups)

            assert_as_torch(_BACKWARD, convolution, _drawn(2, 6, *size), weight, _drawn(6))


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 12])
def test_options_that_differ_by_axis_and_channels_that_choose_the_formula(channels: int) -> None:
    for kernel, stride, padding in itertools.product(
        ((3, 1), (1, 1), (2, 5)), ((1, 2), (2, 1), (1, 1)), ((0, 2), (1, 0))
    ):
        assert_as_torch(
            _BACKWARD,
            lambda x, w, s=stride, p=padding: torch.nn.functional.conv2d(x, w, None, s, p),
            _drawn(3, channels, 9, 8),
            _drawn(4, channels, *kernel),
        )


def test_a_batch_of_one_and_gradients_by_one_operand_alone() -> None:
    x, w = _drawn(1, 5, 7, 7), _drawn(4, 5, 3, 3)
    assert_as_torch(_BACKWARD, lambda x: torch.nn.functional.conv2d(x, w, padding=1), x)
    assert_as_torch(_BACKWARD, lambda w: torch.nn.functional.conv2d(x, w, padding=1), w)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(5, 6, 3, stride=2, padding=1), (2, 5, 11)),
    "same": (nn.Conv2d(5, 6, 3, padding=1), (2, 5, 8, 8)),
    "strided": (nn.Conv2d(5, 6, 3, 2, 1), (2, 5, 8, 9)),
    "rows not read": (nn.Conv2d(5, 6, 2, 3), (2, 5, 10, 9)),
    "few channels": (nn.Conv2d(3, 6, 3, padding=1), (2, 3, 8, 8)),
    "point": (nn.Conv2d(5, 6, 1, 2), (2, 5, 8, 9)),
    "grouped": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 8, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 8, 8)),
    "dilated": (nn.Conv2d(5, 6, 3, padding=2, dilation=2), (2, 5, 8, 8)),
    "transposed": (nn.ConvTranspose2d(5, 6, 3, 2, 1, output_padding=1), (2, 5, 4, 4)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_graph_in_onnxruntime_has_the_gradients_of_autograd(name: str) -> None:
    layer, shape = LAYERS[name]
    assert differing(layer, torch.randn(shape, generator=torch.Generator().manual_seed(0))) == []


_PADDED_SIZES = {1: (6,), 2: (5, 6), 3: (4, 5, 6)}


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "pads", [(1, 2, 4, 0, 2, 1), (0, 0, 3, 9, 0, 1), (-1, 2, 3, -2, -1, -1), (-2, -3, 1, 1, 0, -3)]
)
def test_what_is_copied_from_the_border_comes_back_to_it(dims: int, pads: tuple[int, ...]) -> None:
    used = {f"replication_pad{dims}d_backward"}
    image = _image(*_PADDED_SIZES[dims])
    for each in (image, image[0], _image(*(1,) * dims) if min(pads) >= 0 else image):
        assert_as_torch(used, lambda x: F.pad(x, pads[: 2 * dims], "replicate"), each)


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
    assert differing(function, _image(5, 6).float()) == []
