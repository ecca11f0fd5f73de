"""How the inputs of one process are shared between ranks, and how what the ranks return makes one result again.

Each rank differentiates the mean over its share, as training does: DDP and FSDP average over the ranks. So the
cotangent of a rank is its part of the whole cotangent, times the number of shares. Ranks with the same share, as in
tensor parallelism, compute the same, and get the same cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import listed
from gradctl.forms.form import CannotCapture
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

# The model's inputs: a tuple of those by position, or a dictionary of those by keyword.
Given = tuple[Any, ...] | dict[str, Any]
Shard = Callable[[Given, int, int], Given]


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Which rank has which share of the inputs.

    Attributes:
        world: the number of ranks.
        groups: the ranks of each share, in the order of the shares.
        weights: the part of the batch that each share is; they sum to 1.
        are_of_batch: whether they are parts of the first axis of the inputs.
        is_sum: whether the losses of the shares are summed; if not, their mean is taken.
        gather: the user's ``gather(name, parts)``, which makes one tensor of those of the ranks, or None.
    """

    world: int
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    are_of_batch: bool = False
    is_sum: bool = False
    order: Tensor | None = None
    gather: Callable[[str, list[Tensor | None]], Tensor | None] | None = field(default=None)

    @property
    def is_uneven(self) -> bool:
        """Whether the shares are of different sizes."""
        return len(set(self.weights)) > 1

    def mates(self, rank: int) -> tuple[int, ...]:
        """Return the ranks with the same share as one, itself among them."""
        return next(group for group in self.groups if rank in group)

    def whole(
        self, name: str, parts: Sequence[Tensor | None], shape: Sequence[int], *, is_output: bool = False
    ) -> Tensor | None:
        """Return one tensor of those that the ranks have, with a graph to them.

        Args:
            name: in reports.
            parts: of each rank; None where a rank has none.
            shape: in one process.
            is_output: whether it depends on the share: then of parts with this shape the mean over the shares is taken,
                weighted by their sizes, or the sum; if not, they are copies of one tensor, and the first is returned.

        Raises:
            CannotCapture: the parts do not make a tensor of this shape.
        """
        present = [each for each in parts if each is not None]
        if not present:
            return None
        made = self.gather(name, list(parts)) if self.gather is not None else None
        if made is not None:
            return made
        firsts = [next((parts[rank] for rank in group if parts[rank] is not None), None) for group in self.groups]
        shares = [each for each in firsts if each is not None]
        if all(tuple(each.shape) == tuple(shape) for each in present):
            return self._combined(shares) if is_output else present[0]
        for found in (shares, present):
            axis = _axis_of(found, shape)
            if axis is not None:
                whole = torch.cat(found, axis)
                if is_output and found is shares and self.order is not None and len(self.order) == shape[axis]:
                    return whole.index_select(axis, self.order.argsort())
                return whole
        if all(each.dim() == 1 for each in present) and sum(each.numel() for each in present) == math.prod(shape):
            return torch.cat(present).reshape(tuple(shape))  # parts of the flat tensor, as in FSDP1 and ZeRO
        raise CannotCapture(
            f"{name} has the shapes {listed([str(list(each.shape)) for each in present])} on the ranks, which do not "
            f"make {list(shape)}, its shape in one process. Write gather(name, parts) -> tensor beside the target."
        )

    def _combined(self, shares: Sequence[Tensor]) -> Tensor:
        """Return the mean over the shares of a tensor that each of them has whole, weighted by their sizes."""
        first = shares[0]
        if len(shares) != len(self.groups) or len(shares) == 1 or not (first.is_floating_point() or first.is_complex()):
            return first
        weights = [1.0] * len(shares) if self.is_sum else self.weights
        return torch.stack([each * weight for each, weight in zip(shares, weights, strict=True)]).sum(0)


def _axis_of(parts: Sequence[Tensor], shape: Sequence[int]) -> int | None:
    """Return the axis along which parts make a tensor of a shape, or None."""
    for axis in range(len(shape)):
        alike = all(
            each.dim() == len(shape)
            and all(size == whole for k, (size, whole) in enumerate(zip(each.shape, shape, strict=True)) if k != axis)
            for each in parts
        )
        if alike and sum(each.shape[axis] for each in parts) == shape[axis]:
            return axis
    return None


def given_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Return inputs as ``example_inputs`` returns them."""
    return {**{str(n): each for n, each in enumerate(args)}, **kwargs} if args and kwargs else kwargs or args


def as_call(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as a model is called with them.

    Raises:
        TypeError: a function of the user's returned something else than it was given.
    """
    expected = dict if kwargs else tuple
    if isinstance(given, list) and expected is tuple:
        given = tuple(given)
    if not isinstance(given, expected):
        raise TypeError(f"shard_inputs returns {type(given).__name__!r}; return the {expected.__name__} of the inputs")
    if isinstance(given, tuple):
        return given, {}
    by_position = tuple(given[str(n)] for n in range(len(args)))
    return by_position, {name: given[name] for name in kwargs}


def as_returned(outputs: Mapping[str, Tensor]) -> Any:
    """Return outputs by name as a model returns them, so that they get these names."""
    if list(outputs) == ["output"]:
        return outputs["output"]
    return {name.removeprefix("output."): each for name, each in outputs.items()}


def shares_of(kind: str, world: int, subject: Subject) -> tuple[Shares, Shard]:
    """Return how the inputs of a subject are shared between ranks, and the function that returns the share of a rank.

    Raises:
        CannotCapture: there are more ranks than samples, or ``shard_inputs`` fails.
    """
    beside: Mapping[str, Any] = subject.beside
    is_sum = beside.get("loss_reduction", "mean") == "sum"
    settings = {"is_sum": is_sum, "gather": beside.get("gather")}
    own = beside.get("shard_inputs") if kind == "ranks" else None
    if own is not None:
        return _own_shares(own, world, subject, settings), own
    if kind == "tp":
        return Shares(world, (tuple(range(world)),), (1.0,), **settings), lambda given, rank, world: given
    size = batch_size(subject)
    if size is None or size < world:
        said = f"a batch of {size}" if size else "no tensor with a batch axis"
        raise CannotCapture(
            f"the inputs have {said}, and there are {world} ranks. Use fewer ranks, a larger example, or write "
            "shard_inputs(inputs, rank, world) beside the target for ranks:N."
        )
    sizes = [len(part) for part in torch.arange(size).tensor_split(world)]
    weights = tuple(each / size for each in sizes)
    return Shares(world, tuple((rank,) for rank in range(world)), weights, are_of_batch=True, **settings), _split_batch(
        size
    )


def batch_size(subject: Subject) -> int | None:
    """Return the size of the first axis of the first input that is a tensor with axes, or None."""
    found = (leaf for _, leaf in leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor) and leaf.dim())
    first = next(found, None)
    return None if first is None else len(first)


def _split_batch(size: int) -> Shard:
    """Return the function that splits the first axis of each tensor that has the size of the batch there."""

    def shard(given: Given, rank: int, world: int) -> Given:
        def part(_: str, leaf: Any) -> Any:
            is_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
            return leaf.tensor_split(world)[rank] if is_batch else leaf

        mapped: Given = map_leaves(part, given)
        return mapped

    return shard


def _own_shares(own: Shard, world: int, subject: Subject, settings: dict[str, Any]) -> Shares:
    """Return the shares that the user's ``shard_inputs`` makes: ranks with equal ones are found by marked inputs."""
    marked = map_leaves(_marked, given_inputs(subject.args, subject.kwargs))
    parts = []
    for rank in range(world):
        try:
            part = own(marked, rank, world)
            as_call(part, subject.args, subject.kwargs)
        except Exception as error:  # the user's function may raise anything
            raise CannotCapture(f"shard_inputs fails for rank {rank}: {error}") from error
        parts.append([leaf for _, leaf in leaves(part) if isinstance(leaf, Tensor)])
    groups: list[list[int]] = []
    for rank in range(world):
        same = (group for group in groups if _are_equal(parts[group[0]], parts[rank]))
        found = next(same, None)
        if found is None:
            groups.append([rank])
        else:
            found.append(rank)
    whole = sum(leaf.numel() for _, leaf in leaves(marked) if isinstance(leaf, Tensor))
    sizes = [sum(each.numel() for each in parts[group[0]]) for group in groups]
    # Of what every share has whole, a mask, nothing is said by the sizes: shares that do not make the whole are equal.
    weights = [each / whole if sum(sizes) == whole else 1 / len(groups) for each in sizes]
    tensors = [leaf for _, leaf in leaves(marked) if isinstance(leaf, Tensor)]
    order = _order_of(tensors, [parts[group[0]] for group in groups])
    return Shares(world, tuple(map(tuple, groups)), tuple(weights), order=order, **settings)


def _order_of(tensors: Sequence[Tensor], shares: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Return the order of the shares along the axis of the first tensor that they divide; None if it is that of the
    whole, or cannot be read.

    Args:
        tensors: the marked inputs.
        shares: the parts of each, by share.
    """
    if any(len(share) != len(tensors) for share in shares):
        return None
    for whole, *parts in zip(tensors, *shares, strict=True):
        axis = _axis_of(parts, whole.shape) if len(shares) > 1 and whole.dim() else None
        if axis is None:
            continue
        marks, found = (
            each.movedim(axis, 0).reshape(each.shape[axis], -1)[:, 0] for each in (whole, torch.cat(parts, axis))
        )
        if len(marks.unique()) < len(marks) or not torch.equal(found.sort().values, marks):
            continue
        return None if torch.equal(found, marks) else torch.searchsorted(marks, found)
    return None


def _marked(_: str, leaf: Any) -> Any:
    """Return a tensor of the same shape and type whose elements differ, as far as the type has values."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return leaf
    return torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape).to(leaf.dtype)


def _are_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))
