"""Bags of embeddings and their gradients (aten/src/ATen/native/EmbeddingBag.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import decomposes

_aten = torch.ops.aten
_MEAN, _MAX = 1, 2  # values of ``mode``; sum is 0


@decomposes(_aten._embedding_bag.default, _aten._embedding_bag_forward_only.default)
def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum, mean or maximum of the rows of each bag; the bag of each index; sizes of bags; selected rows.

    A bag has the indices from its offset to the next; the result of an empty one is 0.
    """
    starts = offsets[: offsets.shape[0] - 1] if include_last_offset else offsets
    # Empty bags start at the same index as the next one.
    bag = (torch.arange(indices.shape[0], device=indices.device).unsqueeze(1) >= starts).to(indices.dtype).sum(1) - 1
    counted = indices != padding_idx
    members = (bag == torch.arange(starts.shape[0], device=indices.device).unsqueeze(1)) & counted
    sizes = members.to(indices.dtype).sum(1)
    rows = weight.index_select(0, indices)
    if mode == _MAX:
        among = torch.where(members.unsqueeze(2), rows, float("-inf"))
        empty = (sizes == 0).unsqueeze(1)
        return torch.where(empty, 0, among.amax(1)), bag, sizes, torch.where(empty, -1, indices[among.argmax(1)])
    rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(1)
    total = members.to(rows.dtype).matmul(rows)
    if mode == _MEAN:
        total = total / sizes.clamp_min(1).to(rows.dtype).unsqueeze(1)
    return total, bag, sizes, torch.full_like(sizes, 0)


@decomposes(_aten._embedding_bag_dense_backward.default)
def _embedding_bag_dense_backward(
    grad: Tensor,
    indices: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    """Return the gradient by the weight: each row of a bag has its share of the bag's.

    Raises:
        NotImplementedError: of ``scale_grad_by_freq``: eager on the CPU (torch 2.13) computes other numbers than this.
    """
    if scale_grad_by_freq and mode != _MAX:
        raise NotImplementedError("aten._embedding_bag_dense_backward with scale_grad_by_freq")
    zeros = torch.full((num_weights, grad.shape[1]), 0, dtype=grad.dtype, device=grad.device)
    if mode == _MAX:
        chosen = maximum_indices >= 0
        return zeros.scatter_add(0, torch.where(chosen, maximum_indices, 0), torch.where(chosen, grad, 0))
    share = grad.index_select(0, offset2bag)
    if per_sample_weights is not None:
        share = share * per_sample_weights.unsqueeze(1)
    if mode == _MEAN:
        share = share / bag_size.index_select(0, offset2bag).clamp_min(1).to(grad.dtype).unsqueeze(1)
    share = torch.where((indices != padding_idx).unsqueeze(1), share, 0)
    return zeros.scatter_add(0, indices.unsqueeze(1).expand(share.shape), share)


@decomposes(_aten._embedding_bag_backward.default)
def _embedding_bag_backward(grad: Tensor, indices: Tensor, offsets: Tensor, *others: Any) -> Tensor:
    """Return the gradient by the weight, dense also if eager's is sparse."""
    dense: Any = [grad, indices, *others[:6], *others[7:]]  # without ``sparse``
    return _embedding_bag_dense_backward(*dense)


@decomposes(_aten._embedding_bag_per_sample_weights_backward.default)
def _embedding_bag_per_sample_weights_backward(
    grad: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, offset2bag: Tensor, mode: int, padding_idx: int = -1
) -> Tensor:
    """Return for each index the product of its row with the gradient of its bag; 0 for padding."""
    products = (grad.index_select(0, offset2bag) * weight.index_select(0, indices)).sum(1)
    return torch.where(indices != padding_idx, products, 0)
