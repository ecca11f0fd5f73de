"""Elementwise operators, and fake quantization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import decomposes

_aten = torch.ops.aten


# torch exports where(y <= 0, 0, dy) (torch/_decomp/decompositions.py), and onnxruntime 1.32 takes 40 times as long for
# a Where as for an addition (tests/benchmarks/joint_speed.py --profile).
@decomposes(_aten.threshold_backward.default)
def _threshold_backward(dy: Tensor, y: Tensor, threshold: float) -> Any:
    """Return the gradient of relu: dy clamped to [-b, b], where b is infinite if y is above 0, and 0 elsewhere.

    A mask of 0 and 1 times dy would be NaN if dy is infinite, as in sqrt(relu(x)) at 0; this is 0, as in eager. Other
    thresholds, and types with few exponents, are left to torch.
    """
    if threshold != 0 or y.dtype not in {torch.float32, torch.float64}:
        return NotImplemented
    # Two factors make the smallest normal number infinite. y is not negative: it is the output of relu. Without abs
    # between them, OpenVINO (2026.4) multiplies the factors first, and 0 times their infinite product is NaN.
    large = torch.finfo(y.dtype).max
    bound = (y.relu() * large).abs() * large
    return torch.minimum(torch.maximum(dy, -bound), bound)


# onnxruntime 1.32 takes 15 times as long for a Pow as for a product.
@decomposes(_aten.pow.Tensor_Scalar)
def _pow(x: Tensor, exponent: float) -> Any:
    """Return small whole powers as products, as eager computes them (aten/src/ATen/native/cpu/PowKernel.cpp)."""
    if exponent not in {1, 2, 3} or not x.is_floating_point():
        return NotImplemented
    return x.clone() if exponent == 1 else x * x if exponent == 2 else x * x * x


# onnxruntime (1.32) has a Relu kernel for floats only.
@decomposes(_aten.relu.default)
def _relu(self: Tensor) -> Any:
    return NotImplemented if self.is_floating_point() else torch.where(self < 0, 0, self)


# torch.onnx (2.13) exports Relu if the lower bound is 0, for which onnxruntime has no integer kernel; and it finds no
# overload for bounds of two types.
@decomposes(_aten.clamp.default)
def _clamp(self: Tensor, min: float | None = None, max: float | None = None) -> Any:
    if self.is_floating_point():
        mixed = {type(min), type(max)} == {int, float}
        return _aten.clamp.default(self, float(min or 0), float(max or 0)) if mixed else NotImplemented
    above = self if min is None else torch.where(self < min, min, self)
    return above if max is None else torch.where(above > max, max, above)


@decomposes(_aten.hypot.default)
def _hypot(self: Tensor, other: Tensor) -> Tensor:
    """Return sqrt(x^2 + y^2) by the ratio of the smaller to the larger one: the squares may overflow."""
    first, second = self.abs(), other.abs()
    larger, smaller = torch.maximum(first, second), torch.minimum(first, second)
    ratio = smaller / torch.where((larger == 0) | (larger == torch.inf), 1, larger)
    found = larger * (ratio * ratio + 1).sqrt()
    return torch.where((first == torch.inf) | (second == torch.inf), torch.inf, found)


@decomposes(_aten.copysign.Scalar, _aten.copysign.Tensor)
def _copysign(self: Tensor, other: Tensor | float) -> Tensor:
    if not self.is_floating_point():
        self = self.to(torch.get_default_dtype())
    size = self.abs()
    if isinstance(other, Tensor):
        return torch.where(_signbit(other), -size, size)
    return -size if math.copysign(1.0, other) < 0 else size.clone()


# For torch.onnx (2.13) the sign of -0.0 is plus.
@decomposes(_aten.signbit.default)
def _signbit(self: Tensor) -> Tensor:
    """Return whether the sign is minus: for 0, that of its inverse."""
    return (self < 0) | (1 / self < 0) if self.is_floating_point() else self < 0


@decomposes(_aten.hardshrink_backward.default, _aten.softshrink_backward.default)
def _shrink_backward(grad: Tensor, self: Tensor, lambd: float) -> Tensor:
    return torch.where((self >= -lambd) & (self <= lambd), 0, grad)


@decomposes(_aten.fmax.default, is_first=torch.ge)
@decomposes(_aten.fmin.default, is_first=torch.le)
def _extreme_but_nan(self: Tensor, other: Tensor, *, is_first: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return torch.where(is_first(self, other) | torch.isnan(other), self, other)


@decomposes(_aten.fake_quantize_per_tensor_affine_cachemask.default)
def _fake_quantize(
    self: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Return quantized values, and which were not clipped: their gradient passes straight through."""
    return _quantized(self, torch.tensor(scale, dtype=torch.float32), zero_point, quant_min, quant_max)


@decomposes(_aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def _fake_quantize_if_enabled(
    self: Tensor, scale: Tensor, zero_point: Tensor, fake_quant_enabled: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    output, mask = _quantized(self, scale, zero_point, quant_min, quant_max)
    enabled = fake_quant_enabled.ne(0)
    return torch.where(enabled, output, self), mask | ~enabled


@decomposes(_aten.fake_quantize_per_channel_affine_cachemask.default)
def _fake_quantize_per_channel(
    self: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    shape = [1] * self.dim()
    shape[axis] = -1
    return _quantized(self, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


def _quantized(self: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return the values and the mask, computed in float32 as ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
    (2018).
    """
    scale = scale.to(torch.float32)
    value = torch.round(self * (1.0 / scale).to(self.dtype)) + zero_point
    output = (value.clamp(low, high) - zero_point).to(torch.float32) * scale
    return output.to(self.dtype), (value >= low) & (value <= high)
