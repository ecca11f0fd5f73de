"""The gradients of convolutions, as convolutions.

With y = conv(x, w): the gradient by x is the transposed convolution of dy with w; the gradient by w is a convolution of
x with dy, whose strides and dilations have changed places (Dumoulin and Visin 2016, arXiv 1603.07285, for the shapes);
the gradient by the bias is a sum. For conv_transpose, x and dy change places.

Which of several equal formulas is taken is by the time of onnxruntime (tests/benchmarks/joint_speed.py), whose Conv is
slow with dilations on small images and whose ConvTranspose is slower than Conv: see each function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
_FEW_CHANNELS = 4  # of the input: ConvTranspose is then faster (3 channels: 0.4 of eager's time, Conv 1.3)
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _convolution_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> _Gradients:
    """Return the gradients of ``aten.convolution`` by input ``[N, C, *]``, weight and bias; None where not wanted."""
    spatial = w.ndim - 2
    stride, padding, dilation, output_padding = (
        list(each) * (spatial // len(each)) for each in (stride, padding, dilation, output_padding)
    )
    by_x = by_w = by_bias = None
    if output_mask[0]:
        if transposed:
            by_x = _aten.convolution(dy, w, None, stride, padding, dilation, False, [0] * spatial, groups)
            for k, more in enumerate(output_padding):
                if more >= stride[k]:  # then dy has more than x was asked for
                    by_x = _aten.slice(by_x, k + 2, 0, x.shape[k + 2])
        else:
            reach = [
                (dy.shape[k + 2] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (w.shape[k + 2] - 1) + 1
                for k in range(spatial)
            ]
            rest = [x.shape[k + 2] - reach[k] for k in range(spatial)]
            turns = all(each == 1 for each in stride) and _reaches(w, padding, dilation) and w.shape[1] > _FEW_CHANNELS
            by_x = (
                _by_turned_kernel(dy, w, padding, dilation, groups)
                if turns
                else _transposed(dy, w, stride, padding, dilation, rest, groups)
            )
    if output_mask[1]:
        image, kernel = (dy, x) if transposed else (x, dy)
        size = list(w.shape[2:])
        if groups == 1 and all(each == 1 for each in size) and not any(padding):
            by_w = _by_point_weight(image, kernel, stride)
        elif _is_flat(image, kernel, dilation, groups):
            by_w = _by_flat_weight(image, kernel, size, stride, padding, groups)
        else:
            by_w = _by_weight(image, kernel, size, stride, padding, dilation, groups)
    if output_mask[2]:
        by_bias = dy.sum([0, *range(2, dy.ndim)])
    return by_x, by_w, by_bias


def _reaches(w: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Return whether the padding is no wider than the kernel: then that of the turned convolution is not negative."""
    return all(each <= dilation[k] * (w.shape[k + 2] - 1) for k, each in enumerate(padding))


def _by_turned_kernel(dy: Tensor, w: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Return the gradient by x of a convolution of stride 1: dy convolved with the kernel, turned and transposed."""
    spatial = w.ndim - 2
    outer, inner, *size = w.shape
    grouped = w.reshape(groups, outer // groups, inner, *size).transpose(1, 2)
    turned = grouped.reshape(groups * inner, outer // groups, *size).flip(list(range(2, w.ndim)))
    widths = [dilation[k] * (size[k] - 1) - padding[k] for k in range(spatial)]
    by_x: Tensor = _aten.convolution(dy, turned, None, [1] * spatial, widths, dilation, False, [0] * spatial, groups)
    return by_x


def _transposed(
    dy: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rest: Sequence[int | torch.SymInt],
    groups: int,
) -> Tensor:
    """Return a transposed convolution, ``rest`` longer at its ends; of free sizes ONNX's operator cannot say that."""
    none = [0] * len(rest)
    if all(isinstance(each, int) for each in rest):
        by_x: Tensor = _aten.convolution(dy, w, None, stride, padding, dilation, True, rest, groups)
    else:
        whole = _aten.convolution(dy, w, None, stride, none, dilation, True, none, groups)
        ends = [each for k in reversed(range(len(rest))) for each in (-padding[k], rest[k] - padding[k])]
        by_x = _aten.constant_pad_nd(whole, ends)
    return by_x


def _by_point_weight(x: Tensor, dy: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the gradient by a kernel of size 1: the sum over n, h of dy[n, o, h] x[n, c, h * stride]."""
    for k, step in enumerate(stride):
        if step != 1 or x.shape[k + 2] != dy.shape[k + 2]:
            x = _aten.slice(x, k + 2, 0, step * (dy.shape[k + 2] - 1) + 1, step)
    by_w = torch.matmul(dy.flatten(2), x.flatten(2).transpose(1, 2)).sum(0)
    return by_w.reshape(*by_w.shape, *[1] * len(stride))


def _is_flat(x: Tensor, dy: Tensor, dilation: Sequence[int], groups: int) -> bool:
    """Return whether ``_by_flat_weight`` knows all sizes, and is worth it: with a channel a group it is no faster."""
    sizes = (*x.shape[1:], *dy.shape[2:])
    fixed = all(isinstance(each, int) for each in sizes)
    return fixed and all(each == 1 for each in dilation) and not (groups > 1 and x.shape[1] == groups)


def _by_flat_weight(
    x: Tensor, dy: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    """Return what ``_by_weight`` does, for dilation 1: rows of x hold the channels beside each other.

    A convolution over ``[1, N, H, W * C]`` with dy as ``[O, N, Ho, Wo]``, dilated by ``[stride, stride * C]``, gives
    ``[1, O, kh, kw * C]``: one long inner loop, where an image of ``[C, N, H, W]`` has C short ones.
    """
    batch, channels = x.shape[:2]
    spatial, inner = len(size), channels // groups
    ends = [stride[k] * (dy.shape[k + 2] - 1) + size[k] - x.shape[k + 2] - padding[k] for k in range(spatial)]
    for k, end in enumerate(ends):
        if end < 0:
            x = _aten.slice(x, k + 2, 0, x.shape[k + 2] + end)
    ends = [max(end, 0) for end in ends]
    if groups == 1:  # onnxruntime is quick where one axis moves
        turned = x.movedim(1, -1)
    else:
        turned = x.reshape(batch, groups, inner, *x.shape[2:]).permute(1, 0, *range(3, 3 + spatial), 2)
    image = turned.reshape(1, groups * batch, *x.shape[2:-1], x.shape[-1] * inner)
    widths = [*[1] * (spatial - 1), inner]
    pads = [padding[k] * widths[k] for k in range(spatial)]
    if ends != list(padding):
        around = [each for k in reversed(range(spatial)) for each in (pads[k], ends[k] * widths[k])]
        image, pads = _aten.constant_pad_nd(image, around), [0] * spatial
    steps = [stride[k] * widths[k] for k in range(spatial)]
    found = _aten.convolution(image, dy.transpose(0, 1), None, [1] * spatial, pads, steps, False, [0] * spatial, groups)
    by_w: Tensor = found.reshape(dy.shape[1], *size, inner).movedim(-1, 1)
    return by_w


def _by_weight(
    x: Tensor,
    dy: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the sum over n, h of dy[n, o, h] x[n, c, h * stride + k * dilation - padding]: ``[O, C / groups, *]``."""
    batch, channels = x.shape[:2]
    spatial, inner = len(size), channels // groups
    # What the last tap reads, and no more: then the result has the size of the kernel.
    ends = [
        stride[k] * (dy.shape[k + 2] - 1) + dilation[k] * (size[k] - 1) + 1 - x.shape[k + 2] - padding[k]
        for k in range(spatial)
    ]
    pads = [each for k in reversed(range(spatial)) for each in (padding[k], ends[k])]
    # A free size is none to ask.
    padded = _aten.constant_pad_nd(x, pads) if any(isinstance(each, torch.SymInt) or each for each in pads) else x
    turned = padded.reshape(batch, groups, inner, *padded.shape[2:]).permute(2, 1, 0, *range(3, 3 + spatial))
    image = turned.reshape(inner, groups * batch, *padded.shape[2:])
    found = _aten.convolution(
        image, dy.transpose(0, 1), None, dilation, [0] * spatial, stride, False, [0] * spatial, groups
    )
    by_w: Tensor = found.transpose(0, 1)
    return by_w


TABLE: dict[Any, Callable[..., Any]] = {_aten.convolution_backward.default: _convolution_backward}
