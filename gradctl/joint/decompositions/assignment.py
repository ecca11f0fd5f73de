"""What is written over another tensor: torch's exporter takes it as it is, whatever the shape of that tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return ``source`` in the shape and dtype of ``x`` (torch/_decomp/decompositions.py, copy)."""
    return source.to(x.dtype).expand(x.shape)


TABLE: dict[Any, Callable[..., Any]] = {_aten.copy.default: _copy}
