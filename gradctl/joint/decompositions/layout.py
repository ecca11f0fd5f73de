"""Views of tensors whose layout is no longer what it was when they were traced.

A gradient of torch's own may be laid out as channels_last, and ours of the same operator is not: then what was a view
of one needs a copy of the other. A graph has no layouts, so that the copy is nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _view(x: Tensor, size: Sequence[int]) -> Any:
    """Return ``x`` in another shape (torch/_refs, reshape)."""
    if x.is_contiguous():
        return NotImplemented  # in the way of torch._decomp
    return _aten.clone(x, memory_format=torch.contiguous_format).view(size)


def _slice_copy(x: Tensor, *place: Any, **named: Any) -> Tensor:
    """Return a slice as what may be written to, which it is in the body of a Scan."""
    part: Tensor = _aten.slice.Tensor(x, *place, **named)
    return part.clone()


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.slice_copy.Tensor: _slice_copy,
}
