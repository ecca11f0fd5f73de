"""Fake quantisation, whose gradient passes straight through where nothing was clipped.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018); computed as aten/src/ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp does, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _per_tensor(self: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return quantised values, and where they are those that were given (fake_quantize_per_tensor_affine)."""
    return _quantised(self, torch.tensor(scale, dtype=torch.float32), zero_point, quant_min, quant_max)


def _per_tensor_of_tensors(
    self: Tensor, scale: Tensor, zero_point: Tensor, fake_quant_enabled: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Return the same by a scale and a zero point that are tensors, and what was given if a third one is 0."""
    output, mask = _quantised(self, scale, zero_point, quant_min, quant_max)
    enabled = fake_quant_enabled.ne(0)
    return torch.where(enabled, output, self), mask | ~enabled


def _per_channel(
    self: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor]:
    """Return the same with a scale and a zero point for each index of an axis (fake_quantize_per_channel_affine)."""
    shape = [1] * self.dim()
    shape[axis] = -1
    return _quantised(self, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


def _quantised(self: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int) -> tuple[Tensor, Tensor]:
    scale = scale.to(torch.float32)
    value = torch.round(self * (1.0 / scale).to(self.dtype)) + zero_point
    output = (value.clamp(low, high) - zero_point).to(torch.float32) * scale
    return output.to(self.dtype), (value >= low) & (value <= high)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: _per_tensor_of_tensors,
    _aten.fake_quantize_per_channel_affine_cachemask.default: _per_channel,
    _aten.fake_quantize_per_tensor_affine_cachemask.default: _per_tensor,
}
