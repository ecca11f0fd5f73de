"""The gradients of convolutions, as convolutions.

With y = conv(x, w): the gradient by x is the transposed convolution of dy with w; the gradient by w is a convolution of
x with dy, whose strides and dilations have changed places (Dumoulin and Visin 2016, arXiv 1603.07285, for the shapes);
the gradient by the bias is a sum. For conv_transpose, x and dy change places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
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
    stride, padding, dilation = (list(each) * (spatial // len(each)) for each in (stride, padding, dilation))
    by_x = by_w = by_bias = None
    if output_mask[0]:
        if transposed:
            by_x = _aten.convolution(dy, w, None, stride, padding, dilation, False, [0] * spatial, groups)
        else:
            reach = [
                (dy.shape[k + 2] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (w.shape[k + 2] - 1) + 1
                for k in range(spatial)
            ]
            rest = [x.shape[k + 2] - reach[k] for k in range(spatial)]
            by_x = _aten.convolution(dy, w, None, stride, padding, dilation, True, rest, groups)
    if output_mask[1]:
        image, kernel = (dy, x) if transposed else (x, dy)
        by_w = _by_weight(image, kernel, list(w.shape[2:]), stride, padding, dilation, groups)
    if output_mask[2]:
        by_bias = dy.sum([0, *range(2, dy.ndim)])
    return by_x, by_w, by_bias


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
    padded = _aten.constant_pad_nd(x, pads) if any(pads) else x
    turned = padded.reshape(batch, groups, inner, *padded.shape[2:]).permute(2, 1, 0, *range(3, 3 + spatial))
    image = turned.reshape(inner, groups * batch, *padded.shape[2:])
    found = _aten.convolution(
        image, dy.transpose(0, 1), None, dilation, [0] * spatial, stride, False, [0] * spatial, groups
    )
    by_w: Tensor = found.transpose(0, 1)
    return by_w


TABLE: dict[Any, Callable[..., Any]] = {_aten.convolution_backward.default: _convolution_backward}
