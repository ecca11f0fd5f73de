"""The random numbers that a run draws from torch's generators, as a count and a digest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from gradctl.snapshots.tensor_records import digest
from gradctl.subject.torch_private import OpOverload
from gradctl.tracing.operators import OperatorMode, name_of, writes
from gradctl.tracing.promotion import is_deterministic
from gradctl.tracing.tracer import tensors_in


class DrawRecorder(OperatorMode):
    """A mode that sees the result of each random operator.

    Attributes:
        count: numbers that were drawn.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._hash = hashlib.sha256()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and record what it draws."""
        found = func(*args, **(kwargs or {}))
        is_random = isinstance(func, OpOverload) and torch.Tag.nondeterministic_seeded in func.tags
        if is_random and not is_deterministic(func):
            for tensor in tensors_in(args[:1] if writes(func) else found):
                self._add(name_of(func), tensor)
        return found

    @property
    def summary(self) -> tuple[int, str]:
        """The count and the digest of all that was drawn."""
        return self.count, self._hash.hexdigest()[:16]

    def _add(self, operator: str, tensor: Tensor) -> None:
        self.count += tensor.numel()
        self._hash.update(f"{operator} {tuple(tensor.shape)} {digest(tensor)}\n".encode())
