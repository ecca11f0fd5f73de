"""A batch split along its first axis, and the numbers by which the losses of the parts are weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradctl.subject.tree import leaves, map_leaves

# The index that torch's losses ignore by default, and libraries write into labels.
IGNORED = -100
_LABELS = ("labels", "label", "targets", "target")


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A part of a batch: inputs, positional and by keyword, and which rows they are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: slice

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the size of axis 0 of the first tensor that has one; 0 if none has."""
    return next((each.shape[0] for _, each in leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim), 0)


def split(args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[MicroBatch]:
    """Return the micro-batches, whose sizes differ by one at most: each input that has the batch size along axis 0 is
    split, any other is the same in each.
    """
    size = batch_size(args, kwargs)
    bounds = [0, *(len(part) for part in torch.arange(size).tensor_split(count))]
    ends = torch.tensor(bounds).cumsum(0).tolist()
    return [_part(args, kwargs, size, slice(*pair)) for pair in pairwise(ends)]


def _part(args: tuple[Any, ...], kwargs: dict[str, Any], size: int, rows: slice) -> MicroBatch:
    def part(_: str, leaf: object) -> object:
        is_split = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size
        return leaf[rows] if is_split else leaf  # type: ignore[index]

    own_args, own_kwargs = map_leaves(part, (args, kwargs))
    return MicroBatch(own_args, own_kwargs, rows)


def labels_of(inputs: Sequence[tuple[str, Any]]) -> Tensor | None:
    """Return the labels among named inputs: integers with an ignored index in them, or of such a name."""
    integers = [
        (name, each) for name, each in inputs if isinstance(each, Tensor) and each.dtype in (torch.int64, torch.int32)
    ]
    ignoring = [each for _, each in integers if bool((each == IGNORED).any())]
    named = [each for name, each in integers if name.rpartition(".")[2] in _LABELS]
    return next(iter([*ignoring, *named]), None)


def tokens(labels: Tensor, *, shifted: bool) -> int:
    """Return how many labels are not ignored; ``shifted``: without the first of each row, as language models do it."""
    counted = labels[:, 1:] if shifted and labels.ndim > 1 else labels
    return int((counted != IGNORED).sum())
