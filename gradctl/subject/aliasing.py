"""Tensors that share memory: expanded ones, sliding windows, and several views of one storage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# Kernels that load several elements at once ask for at most 16 of them, or 128 bytes.
_ALIGNED = 64


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors share exactly when they are the same memory seen the same way."""
    if not _has_memory(tensor):
        return (id(tensor),)
    flags = tensor.is_conj(), tensor.is_neg()
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)


def overlaps(tensor: Tensor) -> bool:
    """Return whether elements of the tensor share memory: an expanded tensor, or sliding windows."""
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    reach = 0  # of the axes with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def reach_of(tensor: Tensor) -> tuple[int, int]:
    """Return the first place in the storage that a strided tensor uses, and the one after the last."""
    first = int(tensor.storage_offset())
    span = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return first, first + span + 1


def sharing_groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups: those of one group have elements in the same memory, directly or by a third.

    Two views of one storage that have no element in common are in two groups.
    """
    of_storage: dict[Any, list[list[Tensor]]] = {}
    for tensor in tensors:
        storage = _storage_of(tensor)
        joined: list[Tensor] = []
        apart: list[list[Tensor]] = []
        for group in of_storage.get(storage, ()):
            if any(_share(tensor, other) for other in group):
                joined += group
            else:
                apart.append(group)
        of_storage[storage] = [*apart, [*joined, tensor]]
    return [group for groups in of_storage.values() for group in groups]


def flat_copy(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return the memory that tensors of one group use, in one dimension, and the place in the storage it begins at.

    What none of them uses is zero.
    """
    ends = [reach_of(tensor) for tensor in tensors]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    flat = torch.zeros(high - low, dtype=dtype, device=tensors[0].device)
    for tensor in tensors:
        flat[_places(tensor) - low] = tensor.detach().reshape(-1).to(dtype)
    return flat, low


def clone_as_laid_out(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a differentiable copy with the same strides, gaps and overlap included: programs read strides, or view.

    Its place in the storage has the same alignment. Of an overlapping tensor the copy has no history.
    """
    dtype = dtype or tensor.dtype
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return tensor.clone().to(dtype)
    if overlaps(tensor):
        flat, _ = flat_copy([tensor], dtype)
        return flat.as_strided(tensor.shape, tensor.stride())
    if offset := tensor.storage_offset() % _ALIGNED:
        first, end = reach_of(tensor)
        memory = torch.empty(offset + end - first, dtype=dtype, device=tensor.device)
        return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device).copy_(tensor)


def _places(tensor: Tensor) -> Tensor:
    """Return the place in the storage of each element, in one dimension."""
    places = torch.full((), int(tensor.storage_offset()), device=tensor.device)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + torch.arange(size, device=tensor.device) * stride
    return places.reshape(-1)


def _share(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one storage have an element in the same memory."""
    if storage_key(one) == storage_key(other):
        return True
    (low, high), (other_low, other_high) = reach_of(one), reach_of(other)
    if high <= other_low or other_high <= low:
        return False
    return bool(torch.isin(_places(one), _places(other)).any())


def move_by_ulp(tensors: Iterable[Tensor], seed: int, part: float | None = None) -> None:
    """Move each float element of dense tensors by one ULP up or down, in place; memory that is given twice once.

    ``part`` is another part of the value by which it is moved, for example the machine epsilon of a narrower dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    movable = [each for each in tensors if each.layout == torch.strided and not overlaps(each)]
    with torch.no_grad():
        for tensor in {storage_key(each): each for each in movable}.values():
            if tensor.is_floating_point() or tensor.is_complex():
                sign = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).sign().to(tensor.device)
                tensor.mul_(1 + (part or torch.finfo(tensor.dtype).eps) * sign)


def _storage_of(tensor: Tensor) -> Any:
    """Return what tensors in one storage that can be views of each other have in common."""
    if type(tensor) not in (Tensor, nn.Parameter) or not _has_memory(tensor) or tensor.is_conj() or tensor.is_neg():
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_lazy(tensor) and bool(tensor.numel()) and bool(tensor.data_ptr())
