"""The gradients of convolutions, as convolutions; and of padding with the values at the border.

With y = conv(x, w): the gradient by x is the transposed convolution of dy with w; the gradient by w is a convolution of
x with dy, with strides and dilations exchanged (Dumoulin and Visin 2016, arXiv 1603.07285, for the shapes); the
gradient by the bias is a sum. For conv_transpose, x and dy are exchanged.

Of several equal formulas, the one is used that onnxruntime computes fastest (tests/benchmarks/joint_speed.py): its Conv
is slow with dilations on small images, and its ConvTranspose is slower than Conv.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, decomposes

_aten = torch.ops.aten
_FEW_CHANNELS = 4  # of the input: ConvTranspose is then faster (3 channels: 0.4 of eager's time, Conv 1.3)


@decomposes(_aten.convolution_backward.default)
def _convolution_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients by input ``[N, C, *]``, weight and bias, each if its mask is set."""
    sizes, size = x.shape[2:], w.shape[2:]
    stride, padding, dilation, output_padding = (
        list(each) * (len(size) // len(each)) for each in (stride, padding, dilation, output_padding)
    )
    by_x = by_w = by_bias = None
    if output_mask[0] and transposed:
        by_x = _aten.convolution(dy, w, None, stride, padding, dilation, False, [0] * len(size), groups)
        for k, more in enumerate(output_padding):
            if more >= stride[k]:  # then dy reaches beyond x
                by_x = _aten.slice(by_x, k + 2, 0, sizes[k])
    elif output_mask[0]:
        by_x = _by_input(dy, w, sizes, stride, padding, dilation, groups)
    if output_mask[1]:
        image, kernel = (dy, x) if transposed else (x, dy)
        by_w = _by_weight(image, kernel, size, stride, padding, dilation, groups)
    if output_mask[2]:
        by_bias = dy.sum([0, *range(2, dy.ndim)])
    return by_x, by_w, by_bias


def _by_input(dy: Tensor, w: Tensor, sizes: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Any:
    """Return the gradient by x, of these sizes."""
    widths = [dilation[k] * (size - 1) - padding[k] for k, size in enumerate(w.shape[2:])]
    # The padding of the flipped convolution must not be negative.
    if all(each == 1 for each in stride) and min(widths) >= 0 and w.shape[1] > _FEW_CHANNELS:
        return _by_flipped_kernel(dy, w, widths, dilation, groups)
    return _by_transposed(dy, w, sizes, stride, padding, dilation, groups)


def _by_flipped_kernel(dy: Tensor, w: Tensor, widths: Ints, dilation: Ints, groups: int) -> Any:
    """Return the gradient by x of a convolution of stride 1: dy convolved with the flipped and transposed kernel."""
    spatial = w.ndim - 2
    outer, inner, *size = w.shape
    grouped = w.reshape(groups, outer // groups, inner, *size).transpose(1, 2)
    flipped = grouped.reshape(groups * inner, outer // groups, *size).flip(list(range(2, w.ndim)))
    return _aten.convolution(dy, flipped, None, [1] * spatial, widths, dilation, False, [0] * spatial, groups)


def _by_transposed(dy: Tensor, w: Tensor, sizes: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Any:
    """Return the gradient by x as a transposed convolution."""
    none = [0] * len(sizes)
    rest = []  # the elements of x beyond the last one that was read
    for k, size in enumerate(sizes):
        reach = (dy.shape[k + 2] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (w.shape[k + 2] - 1) + 1
        rest.append(size - reach)
    if all(isinstance(each, int) for each in rest):
        return _aten.convolution(dy, w, None, stride, padding, dilation, True, rest, groups)
    # The output padding of ConvTranspose is an attribute, which cannot be symbolic.
    whole = _aten.convolution(dy, w, None, stride, none, dilation, True, none, groups)
    return _padded(whole, [-each for each in padding], [more - each for more, each in zip(rest, padding, strict=True)])


def _by_weight(x: Tensor, dy: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    """Return the sum over n, h of dy[n, o, h] x[n, c, h * stride + k * dilation - padding]: ``[O, C / groups, *]``."""
    if groups == 1 and all(each == 1 for each in size) and not any(padding):
        return _by_point_weight(x, dy, stride)
    are_known = all(isinstance(each, int) for each in (*x.shape[1:], *dy.shape[2:]))
    is_depthwise = groups > 1 and x.shape[1] == groups  # then the general formula is faster
    if are_known and all(each == 1 for each in dilation) and not is_depthwise:
        return _by_flat_weight(x, dy, size, stride, padding, groups)
    return _by_any_weight(x, dy, size, stride, padding, dilation, groups)


def _by_point_weight(x: Tensor, dy: Tensor, stride: Ints) -> Tensor:
    """Return the gradient by a kernel of size 1: the sum over n, h of dy[n, o, h] x[n, c, h * stride]."""
    for k, step in enumerate(stride):
        if step != 1 or x.shape[k + 2] != dy.shape[k + 2]:
            x = _aten.slice(x, k + 2, 0, step * (dy.shape[k + 2] - 1) + 1, step)
    by_w = torch.matmul(dy.flatten(2), x.flatten(2).transpose(1, 2)).sum(0)
    return by_w.reshape(*by_w.shape, *[1] * len(stride))


def _by_flat_weight(x: Tensor, dy: Tensor, size: Ints, stride: Ints, padding: Ints, groups: int) -> Tensor:
    """Return the result of ``_by_weight`` for known sizes and dilation 1: rows of x hold the channels side by side.

    A convolution over ``[1, N, H, W * C]`` with dy as ``[O, N, Ho, Wo]``, dilated by ``[stride, stride * C]``, has the
    result ``[1, O, kh, kw * C]``: one long inner loop, where an image of ``[C, N, H, W]`` has C short ones.
    """
    batch, channels = x.shape[:2]
    spatial, inner = len(size), channels // groups
    ends = [stride[k] * (dy.shape[k + 2] - 1) + size[k] - x.shape[k + 2] - padding[k] for k in range(spatial)]
    for k, end in enumerate(ends):
        if end < 0:
            x = _aten.slice(x, k + 2, 0, x.shape[k + 2] + end)
    ends = [max(end, 0) for end in ends]
    if groups == 1:  # onnxruntime is fast if one axis moves
        moved = x.movedim(1, -1)
    else:
        moved = x.reshape(batch, groups, inner, *x.shape[2:]).permute(1, 0, *range(3, 3 + spatial), 2)
    image = moved.reshape(1, groups * batch, *x.shape[2:-1], x.shape[-1] * inner)
    widths = [*[1] * (spatial - 1), inner]
    pads = [padding[k] * widths[k] for k in range(spatial)]
    if ends != list(padding):
        image, pads = _padded(image, pads, [ends[k] * widths[k] for k in range(spatial)]), [0] * spatial
    steps = [stride[k] * widths[k] for k in range(spatial)]
    found = _aten.convolution(image, dy.transpose(0, 1), None, [1] * spatial, pads, steps, False, [0] * spatial, groups)
    by_w: Tensor = found.reshape(dy.shape[1], *size, inner).movedim(-1, 1)
    return by_w


def _by_any_weight(
    x: Tensor, dy: Tensor, size: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """Return the result of ``_by_weight`` as a convolution of the channels as a batch."""
    batch, channels = x.shape[:2]
    spatial, inner = len(size), channels // groups
    # Up to the element that the last tap reads: then the result has the size of the kernel.
    reaches = [stride[k] * (dy.shape[k + 2] - 1) + dilation[k] * (size[k] - 1) + 1 for k in range(spatial)]
    ends = [reaches[k] - x.shape[k + 2] - padding[k] for k in range(spatial)]
    # Symbolic sizes cannot be tested for zero.
    if any(isinstance(each, torch.SymInt) or each for each in (*padding, *ends)):
        x = _padded(x, padding, ends)
    moved = x.reshape(batch, groups, inner, *x.shape[2:]).permute(2, 1, 0, *range(3, 3 + spatial))
    image, none = moved.reshape(inner, groups * batch, *x.shape[2:]), [0] * spatial
    found = _aten.convolution(image, dy.transpose(0, 1), None, dilation, none, stride, False, none, groups)
    by_w: Tensor = found.transpose(0, 1)
    return by_w


def _padded(x: Tensor, before: Ints, after: Ints) -> Any:
    """Return ``x`` with zeros before and after it along its last axes; fewer elements, if these are negative."""
    pads = [each for k in reversed(range(len(before))) for each in (before[k], after[k])]
    return _aten.constant_pad_nd(x, pads)


@decomposes(
    _aten.replication_pad1d_backward.default,
    _aten.replication_pad2d_backward.default,
    _aten.replication_pad3d_backward.default,
)
def _replication_pad_backward(dy: Tensor, x: Tensor, padding: Ints) -> Any:
    """Return the gradient: each element has its own and those of its copies; a negative padding removes elements."""
    for axis, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim = x.ndim - 1 - axis
        size = x.shape[dim] + min(before, 0) + min(after, 0)
        if size < 1:
            return NotImplemented  # the border that is copied lies outside the remaining elements
        start = max(before, 0)
        if size == 1:
            dy = dy.sum(dim, keepdim=True)
            continue
        first = dy.narrow(dim, 0, start + 1).sum(dim, keepdim=True)
        end = start + size - 1
        last = dy.narrow(dim, end, dy.shape[dim] - end).sum(dim, keepdim=True)
        dy = torch.cat([first, dy.narrow(dim, start + 1, size - 2), last], dim)
    if any(each < 0 for each in padding):
        dy = _aten.constant_pad_nd(dy, [max(-each, 0) for each in padding])
    return dy
