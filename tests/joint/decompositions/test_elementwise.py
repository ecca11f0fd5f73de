"""Elementwise operators and fake quantization, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, values
from tests.joint.joined import differing, joint_graph


@pytest.mark.parametrize("exponent", [1, 2, 3, 2.0])
def test_small_powers(exponent: float) -> None:
    x = torch.tensor([-2.5, -0.0, 0.0, 1e-200, 3.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    assert_as_torch({"pow"}, lambda x: x**exponent, x[:5])
    torch.testing.assert_close(TABLE[torch.ops.aten.pow.Tensor_Scalar](x, exponent), x**exponent, equal_nan=True)


def test_other_powers_are_left_to_torch() -> None:
    power = TABLE[torch.ops.aten.pow.Tensor_Scalar]
    assert {power(torch.ones(2), exponent) for exponent in (0, 0.5, -1, 4, 2.5)} == {NotImplemented}
    assert power(torch.ones(2, dtype=torch.int64), 2) is NotImplemented


def test_a_relu_is_computed_once() -> None:
    graph = joint_graph(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    assert [node.op_type for node in graph.graph.node].count("Relu") == 1


def test_large_factors_of_a_relu_are_not_adjacent() -> None:
    """OpenVINO 2026.4 would multiply them first: their product is infinite, and 0 times it is NaN."""
    graph = joint_graph(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)).graph
    constants = {each.name for each in graph.initializer}
    by_constants = [node for node in graph.node if node.op_type == "Mul" and constants & set(node.input)]
    scaled = {node.output[0] for node in by_constants}
    assert len(by_constants) == 2 and not [node for node in by_constants if scaled & set(node.input)]


@pytest.mark.parametrize("threshold", [0.0, 0.5, -0.5])
def test_relu_and_threshold_pass_a_gradient_above_it_alone(threshold: float) -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 1e-300, 3.0, float("inf")], dtype=torch.float64)
    used = {"threshold_backward"} if threshold == 0 else set()
    assert_as_torch(used, lambda x: torch.nn.functional.threshold(x, threshold, -1.0), x)


def test_an_infinite_gradient_where_relu_is_zero_is_zero_as_in_torch() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert_as_torch({"threshold_backward"}, lambda x: x.relu().sqrt(), x)


aten = torch.ops.aten


def test_the_hypotenuse_of_large_and_of_small_legs_is_finite():
    legs = torch.tensor([0.0, 3.0, -4.0, 1e200, 1e-200, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    x, y = torch.meshgrid(legs, legs, indexing="ij")
    torch.testing.assert_close(TABLE[aten.hypot.default](x, y), torch.hypot(x, y), equal_nan=True)
    assert_as_torch({"hypot"}, torch.hypot, values(3, 4), values(4))


def test_a_sign_is_copied_from_zero_too():
    signs = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.inf, -torch.inf])
    for x in (values(6), torch.arange(-3, 3)):
        torch.testing.assert_close(TABLE[aten.copysign.Tensor](x, signs), torch.copysign(x, signs))
        for sign in (2.0, -0.0):
            torch.testing.assert_close(TABLE[aten.copysign.Scalar](x, sign), torch.copysign(x, sign))
    torch.testing.assert_close(TABLE[aten.signbit.default](signs), signs.signbit())
    torch.testing.assert_close(TABLE[aten.signbit.default](torch.arange(-2, 2)), torch.arange(-2, 2).signbit())


@pytest.mark.parametrize("shrink", [F.softshrink, F.hardshrink])
@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_nothing_goes_through_between_the_bounds(shrink, bound):
    at = torch.cat([values(20), torch.tensor([bound, -bound, 0.0])])
    used = {f"{shrink.__name__}_backward"}
    assert_as_torch(used, lambda x: shrink(x, bound), at)


@pytest.mark.parametrize("choose", [torch.fmax, torch.fmin])
def test_a_number_is_chosen_before_what_is_none(choose):
    first = torch.tensor([1.0, torch.nan, 2.0, torch.nan, -torch.inf], dtype=torch.float64)
    second = torch.tensor([2.0, 1.0, torch.nan, torch.nan, 3.0], dtype=torch.float64)
    operator = getattr(aten, choose.__name__).default
    torch.testing.assert_close(TABLE[operator](first, second), choose(first, second), equal_nan=True)


def test_integers_are_clamped():
    x = torch.arange(-3, 4)
    for bounds in ((0, None), (None, 1), (-1, 1)):
        torch.testing.assert_close(TABLE[aten.clamp.default](x, *bounds), x.clamp(*bounds))
    torch.testing.assert_close(TABLE[aten.relu.default](x), x.relu())


@pytest.mark.parametrize("bounds", [(0, 0.9), (-0.5, 1)])
def test_bounds_of_two_types_are_right_in_onnxruntime(bounds: tuple[float, float]):
    assert differing(lambda x: x.clamp(*bounds), values(4, 5).float()) == []


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
    assert_as_torch(used, lambda x: function(x, scale, zero, low, high), points(dtype))


@pytest.mark.parametrize("enabled", [0, 1])
def test_per_tensor_by_tensors(enabled):
    scale, zero = torch.tensor([0.1]), torch.tensor([4], dtype=torch.int32)

    def function(x: Tensor) -> Tensor:
        found = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        return found(x, scale, zero, torch.tensor([enabled]), 0, 255)[0]

    assert_as_torch({"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"}, function, points())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("zero_dtype", [torch.int32, torch.float32])
def test_per_channel(axis, zero_dtype):
    x = points()
    scale = torch.linspace(0.05, 0.5, x.shape[axis])
    zero = torch.arange(x.shape[axis], dtype=zero_dtype) % 7
    used = {"fake_quantize_per_channel_affine_cachemask"}
    assert_as_torch(used, lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, axis, 0, 255), x)


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
