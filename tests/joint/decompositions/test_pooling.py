"""Pooling and its gradients, against torch's own kernels and autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

_SIZES = {1: (11,), 2: (9, 11), 3: (7, 5, 8)}


def _image(dims: int, *, ties: bool = False) -> Tensor:
    image = torch.randn(2, 3, *_SIZES[dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return image.round() if ties else image


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding"), [(None, 0), (1, 1), (2, 1), (3, 1), (5, 0)])
@pytest.mark.parametrize(("ceil_mode", "count_include_pad"), list(itertools.product((False, True), repeat=2)))
def test_averages_count_what_torch_counts(
    dims: int, stride: int | None, padding: int, ceil_mode: bool, count_include_pad: bool
) -> None:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    used = {f"avg_pool{max(dims, 2)}d_backward"}
    for image in (_image(dims), _image(dims)[0]):
        assert_as_torch(used, lambda x: pool(x, 3, stride, padding, ceil_mode, count_include_pad), image)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_divisor_takes_the_place_of_the_count(dims: int, ceil_mode: bool) -> None:
    pool = (F.avg_pool2d, F.avg_pool3d)[dims - 2]
    kernel, stride, padding = [3, 2, 4][:dims], [2, 3, 1][:dims], [1, 0, 2][:dims]
    assert_as_torch(
        {f"avg_pool{dims}d", f"avg_pool{dims}d_backward"},
        lambda x: pool(x, kernel, stride, padding, ceil_mode, divisor_override=7),
        _image(dims),
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("out", [1, 2, 4, 5, 14])
def test_adaptive_windows_are_those_of_torch(dims: int, out: int) -> None:
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    maximum = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[dims - 1]
    assert_as_torch(
        set() if out == 1 else {f"_adaptive_avg_pool{max(dims, 2)}d"}, lambda x: average(x, out), _image(dims)
    )
    for image in (_image(dims), _image(dims, ties=True), _image(dims)[0]):
        used = {f"adaptive_max_pool{max(dims, 2)}d", f"adaptive_max_pool{max(dims, 2)}d_backward"}
        assert_as_torch(used, lambda x: maximum(x, out, return_indices=True), image)


@pytest.mark.parametrize("size", [(3, 11), (9, 4), (18, 22)])
def test_adaptive_windows_of_whole_sizes_are_plain_ones(size: Sequence[int]) -> None:
    assert_as_torch(set(), lambda x: F.adaptive_avg_pool2d(x, size), _image(2))
    assert_as_torch(set(), lambda x: F.adaptive_max_pool2d(x, size, return_indices=True), _image(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "ceil_mode"),
    [(None, 0, 1, False), (1, 1, 1, False), (2, 1, 1, True), (1, 0, 2, False), (3, 1, 2, True)],
)
def test_a_maximum_hands_its_gradient_on(
    dims: int, stride: int | None, padding: int, dilation: int, ceil_mode: bool
) -> None:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    for image in (_image(dims), _image(dims, ties=True), _image(dims)[0]):
        assert_as_torch(
            {f"max_pool{max(dims, 2)}d_with_indices_backward"},
            lambda x: pool(x, 2, stride, padding, dilation, ceil_mode, return_indices=True),
            image,
        )


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), id="average-ceil-excluding-pad"),
        pytest.param(lambda x: F.avg_pool3d(x[:, :, None], (1, 3, 2), 2, (0, 1, 1)), id="average-3d"),
        pytest.param(lambda x: F.avg_pool1d(x[0], 3, 2, 1, True), id="average-1d-ceil"),
        pytest.param(lambda x: F.lp_pool2d(x.exp(), 3, 2), id="lp"),
        pytest.param(lambda x: F.local_response_norm(x, 3), id="local-response-norm"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (4, 14)), id="adaptive-average"),
        pytest.param(lambda x: F.adaptive_max_pool2d(x, (4, 14), return_indices=True), id="adaptive-maximum"),
        pytest.param(lambda x: F.adaptive_max_pool3d(x[:, :, None], (2, 3, 5)), id="adaptive-maximum-3d"),
        pytest.param(lambda x: F.max_pool2d(x.relu(), 3, 2, 1, ceil_mode=True), id="maximum-with-ties"),
        pytest.param(lambda x: F.max_pool3d(x[:, :, None], (1, 3, 2), 1, (0, 1, 1)), id="maximum-3d"),
    ],
)
def test_onnxruntime_pools_as_eager_does(model: object) -> None:
    assert differing(model, _image(2).float()) == []
