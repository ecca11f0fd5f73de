"""Fake quantisation, of all options: values beside steps and beyond the ends, enabled or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradctl.joint.decompositions.quantization import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing


def points(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values of which some lie halfway between two steps of 0.25, and some beyond 127 of them."""
    drawn = 10 * torch.randn(30, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return torch.cat([drawn, torch.arange(-300.0, 300.0, dtype=dtype).reshape(-1, 4) / 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.25, 0.1, 0.037])
@pytest.mark.parametrize(("zero", "low", "high"), [(0, -128, 127), (30, 0, 255), (3, 0, 15)])
def test_per_tensor(dtype, scale, zero, low, high):
    used = {"fake_quantize_per_tensor_affine_cachemask"}
    function = torch.fake_quantize_per_tensor_affine
    assert_as_torch(TABLE, used, lambda x: function(x, scale, zero, low, high), points(dtype))


@pytest.mark.parametrize("enabled", [0, 1])
def test_per_tensor_by_tensors(enabled):
    scale, zero = torch.tensor([0.1]), torch.tensor([4], dtype=torch.int32)

    def function(x: Tensor) -> Tensor:
        found = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        return found(x, scale, zero, torch.tensor([enabled]), 0, 255)[0]

    assert_as_torch(TABLE, {"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"}, function, points())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("zero_dtype", [torch.int32, torch.float32])
def test_per_channel(axis, zero_dtype):
    x = points()
    scale = torch.linspace(0.05, 0.5, x.shape[axis])
    zero = torch.arange(x.shape[axis], dtype=zero_dtype) % 7
    used = {"fake_quantize_per_channel_affine_cachemask"}
    assert_as_torch(TABLE, used, lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, axis, 0, 255), x)


class Quantised(nn.Module):
    """A layer as it is trained for integers: weights by channel, what goes in by one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor([0.01, 0.02, 0.05]))
        self.register_buffer("zero", torch.zeros(3, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        given = torch.fake_quantize_per_tensor_affine(x, 0.05, 10, 0, 40)
        weight = torch.fake_quantize_per_channel_affine(self.linear.weight, self.scale, self.zero, 0, -8, 7)
        return nn.functional.linear(given, weight, self.linear.bias)


def test_a_quantised_layer_in_onnxruntime():
    torch.manual_seed(0)
    assert differing(Quantised(), torch.randn(5, 4)) == []
