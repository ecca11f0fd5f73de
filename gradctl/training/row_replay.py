"""Random numbers of a batch, recorded, and replayed for the rows of a micro-batch: dropout masks are then the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradctl.tracing.operators import OperatorMode, name_of, writes


class CannotReplay(Exception):
    """The random numbers of a batch are not those of its rows."""


class BatchRecording(OperatorMode):
    """Keeps the result of each random operator of one forward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, is_random = run_operator(func, args, kwargs or {})
        if is_random:
            self.drawn.append((name_of(func), _copied(result)))
        return result


class Replay(OperatorMode):
    """Puts the rows of recorded results in the place of the results of random operators.

    Args:
        recording: of the whole batch.
        rows: of the micro-batch.
        size: of the batch.
    """

    def __init__(self, recording: BatchRecording, rows: slice, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording, self.rows, self.size = recording, rows, size
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, is_random = run_operator(func, args, kwargs or {})
        if not is_random:
            return result
        if self._next >= len(self.recording.drawn) or self.recording.drawn[self._next][0] != name_of(func):
            raise CannotReplay(f"a micro-batch calls {name_of(func)} where the batch does not")
        name, recorded = self.recording.drawn[self._next]
        self._next += 1
        if any(isinstance(each, Tensor) and each.requires_grad for each in args) or not isinstance(recorded, Tensor):
            raise CannotReplay(f"the result of {name} depends on more than its random numbers")
        rows = self._rows_of(recorded, result.shape, name)
        return args[0].copy_(rows) if writes(func) else rows

    def _rows_of(self, recorded: Tensor, shape: torch.Size, name: str) -> Tensor:
        """Return the rows that a micro-batch has of a result; axis 0 may be the batch times heads, or not the batch."""
        if recorded.shape == shape:
            return recorded.clone()
        count = self.rows.stop - self.rows.start
        times = recorded.shape[0] // self.size if recorded.ndim else 0
        if recorded.shape[1:] != shape[1:] or times * self.size != recorded.shape[0] or shape[0] != times * count:
            raise CannotReplay(f"the random numbers of {name} have the shape {list(recorded.shape)}, not by sample")
        return recorded[self.rows.start * times : self.rows.stop * times].clone()


def run_operator(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Return the result of an operator, and whether it drew random numbers: attention without dropout draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return func(*args, **kwargs), False
    if isinstance(kwargs.get("generator"), torch.Generator):
        return func(*args, **kwargs), True
    before = torch.get_rng_state()
    result = func(*args, **kwargs)
    return result, not torch.equal(before, torch.get_rng_state())


def _copied(result: Any) -> Any:
    return result.detach().clone() if isinstance(result, Tensor) else result
