"""Which constant of one graph is which of another, and by how much those that changed did.

In this order: 1. same name and content; 2. same name, taken by the same input of matched nodes; 3. same content;
4. taken by the same input of matched nodes; 5. same name. A name alone comes last, since exporters number constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from gradctl.core.numbers import number
from gradctl.core.structure import InitializerChange
from gradctl.graphdiff.graph_view import Constant, GraphView, content
from gradctl.graphdiff.node_matching import Matching
from gradctl.numerics.measures import relative_error
from gradctl.onnxio.onnx_file import onnx_dtype_name


def paired_constants(found: Matching) -> dict[int, int]:
    """Return the constant of the second graph for one of the first, by place."""
    mine, theirs = found.a.view.constants, found.b.view.constants
    pairs: dict[int, int] = {}
    taken: set[int] = set()

    def pair(one: int, other: int) -> None:
        if one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)

    by_name = {constant.name: place for place, constant in enumerate(theirs)}
    used = list(_used_alike(found))
    named = [(one, by_name[constant.name]) for one, constant in enumerate(mine) if constant.name in by_name]
    for one, other in named:
        if mine[one].digest == theirs[other].digest:
            pair(one, other)
    for one, other in used:
        if mine[one].name == theirs[other].name:
            pair(one, other)
    for one, other in _of_one_content(mine, theirs, pairs, taken):
        pair(one, other)
    for one, other in (*used, *named):
        pair(one, other)
    return pairs


def constant_changes(found: Matching, pairs: Mapping[int, int]) -> Iterator[InitializerChange]:
    """Give what changed, is gone, or is new; a constant that one equal to it stands for is none of these."""
    mine, theirs = found.a.view, found.b.view
    for one, other in sorted(pairs.items()):
        if mine.constants[one].digest != theirs.constants[other].digest:
            yield _changed(mine, mine.constants[one], theirs, theirs.constants[other])
    known = {constant.digest for constant in theirs.constants}
    for place, constant in enumerate(mine.constants):
        if place not in pairs and constant.digest not in known:
            yield InitializerChange(kind="removed", name=constant.name, type_before=_type(constant))
    known, taken = {constant.digest for constant in mine.constants}, set(pairs.values())
    for place, constant in enumerate(theirs.constants):
        if place not in taken and constant.digest not in known:
            yield InitializerChange(kind="added", name=constant.name, type_after=_type(constant))


def moved_constants(found: Matching, pairs: Mapping[int, int]) -> int:
    """Return how many are the same under another name, or an initializer here and a node there."""
    mine, theirs = found.a.view.constants, found.b.view.constants
    return sum(
        mine[one].digest == theirs[other].digest
        and (mine[one].name, mine[one].is_initializer) != (theirs[other].name, theirs[other].is_initializer)
        for one, other in pairs.items()
    )


def _used_alike(found: Matching) -> Iterator[tuple[int, int]]:
    for one, other in sorted(found.to_b.items()):
        for mine, theirs in zip(found.a.view.inputs[one], found.b.view.inputs[other], strict=False):
            if mine.kind == theirs.kind == "constant":
                yield int(mine.of), int(theirs.of)


def _of_one_content(
    mine: list[Constant], theirs: list[Constant], pairs: Mapping[int, int], taken: set[int]
) -> Iterator[tuple[int, int]]:
    waiting: dict[bytes, list[int]] = {}
    for place, constant in enumerate(theirs):
        if place not in taken:
            waiting.setdefault(constant.digest, []).append(place)
    for place, constant in enumerate(mine):
        if place not in pairs and waiting.get(constant.digest):
            yield place, waiting[constant.digest].pop(0)


def _changed(mine: GraphView, one: Constant, theirs: GraphView, other: Constant) -> InitializerChange:
    kinds = _type(one), _type(other)
    change = InitializerChange(
        kind="changed", name=one.name, name_after=other.name, type_before=kinds[0], type_after=kinds[1]
    )
    if kinds[0] != kinds[1] or one.tensor is None or other.tensor is None:
        return change
    before, after = content(one.tensor, mine.folder), content(other.tensor, theirs.folder)
    if before.dtype == np.object_:
        return change
    wide = np.complex128 if np.iscomplexobj(before) else np.float64
    left, right = (torch.from_numpy(np.asarray(each, dtype=wide)) for each in (before, after))
    largest = float((right - left).abs().max()) if left.numel() else 0.0
    error = relative_error(left, right)
    return InitializerChange(
        kind="changed",
        name=one.name,
        name_after=other.name,
        type_before=kinds[0],
        type_after=kinds[1],
        error=number(error),
        max_abs=number(largest),
    )


def _type(constant: Constant) -> str:
    if constant.tensor is None:
        return "sparse"
    return f"{onnx_dtype_name(constant.tensor.data_type)}{list(constant.tensor.dims)}"
