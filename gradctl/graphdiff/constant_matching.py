"""Matching of the constants of two graphs, and the differences of those that changed.

In this order: 1. same name and content; 2. same name, used by the same input of matched nodes; 3. same content;
4. used by the same input of matched nodes; 5. same name. A name alone comes last, since exporters number constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import torch

from gradctl.core.numbers import number
from gradctl.core.structure import InitializerChange
from gradctl.graphdiff.graph_view import Constant, GraphView, content
from gradctl.graphdiff.node_matching import Matching
from gradctl.numerics.measures import relative_error
from gradctl.onnxio.onnx_file import onnx_dtype_name


def match_constants(found: Matching) -> dict[int, int]:
    """Return the positions of the constants of the second graph by those of the first."""
    reference, candidate = found.a.view.constants, found.b.view.constants
    by_name = {constant.name: place for place, constant in enumerate(candidate)}
    named = [(one, by_name[constant.name]) for one, constant in enumerate(reference) if constant.name in by_name]
    used = list(_used_alike(found))
    pairs: dict[int, int] = {}
    _add(pairs, (pair for pair in named if reference[pair[0]].digest == candidate[pair[1]].digest))
    _add(pairs, (pair for pair in used if reference[pair[0]].name == candidate[pair[1]].name))
    _add(pairs, _of_same_content(reference, candidate, pairs))
    _add(pairs, used)
    _add(pairs, named)
    return pairs


def constant_changes(found: Matching, pairs: Mapping[int, int]) -> Iterator[InitializerChange]:
    """Yield the constants that changed, were removed or were added; one with an equal counterpart is neither."""
    reference, candidate = found.a.view, found.b.view
    for one, other in sorted(pairs.items()):
        if reference.constants[one].digest != candidate.constants[other].digest:
            yield _changed(reference, reference.constants[one], candidate, candidate.constants[other])
    for each in _only_in(reference, candidate, pairs.keys()):
        yield InitializerChange(kind="removed", name=each.name, type_before=_type(each))
    for each in _only_in(candidate, reference, pairs.values()):
        yield InitializerChange(kind="added", name=each.name, type_after=_type(each))


def count_moved_constants(found: Matching, pairs: Mapping[int, int]) -> int:
    """Return how many equal constants have another name, or are an initializer in one graph and a node in the other."""
    matched = ((found.a.view.constants[one], found.b.view.constants[other]) for one, other in pairs.items())
    return sum(a.digest == b.digest and (a.name, a.is_initializer) != (b.name, b.is_initializer) for a, b in matched)


def _add(pairs: dict[int, int], candidates: Iterable[tuple[int, int]]) -> None:
    """Add those pairs of which neither constant has a counterpart yet."""
    taken = set(pairs.values())
    for one, other in candidates:
        if one not in pairs and other not in taken:
            pairs[one] = other
            taken.add(other)


def _used_alike(found: Matching) -> Iterator[tuple[int, int]]:
    for reference, candidate in itertools.chain.from_iterable(map(found.inputs, sorted(found.to_b))):
        if reference.kind == candidate.kind == "constant":
            yield reference.place, candidate.place


def _of_same_content(
    reference: Sequence[Constant], candidate: Sequence[Constant], pairs: Mapping[int, int]
) -> list[tuple[int, int]]:
    waiting: dict[bytes, list[int]] = {}
    for place in sorted(set(range(len(candidate))) - set(pairs.values())):
        waiting.setdefault(candidate[place].digest, []).append(place)
    return [
        (place, waiting[constant.digest].pop(0))
        for place, constant in enumerate(reference)
        if place not in pairs and waiting.get(constant.digest)
    ]


def _only_in(view: GraphView, other: GraphView, matched: Collection[int]) -> list[Constant]:
    """Return the unmatched constants of one graph whose content the other does not have."""
    known = {constant.digest for constant in other.constants}
    unmatched = (view.constants[place] for place in sorted(set(range(len(view.constants))) - set(matched)))
    return [each for each in unmatched if each.digest not in known]


def _changed(reference: GraphView, one: Constant, candidate: GraphView, other: Constant) -> InitializerChange:
    change = InitializerChange(
        kind="changed", name=one.name, name_after=other.name, type_before=_type(one), type_after=_type(other)
    )
    if change.type_before != change.type_after or one.tensor is None or other.tensor is None:
        return change
    before, after = content(one.tensor, reference.folder), content(other.tensor, candidate.folder)
    if before.dtype == np.object_:
        return change
    dtype = np.complex128 if np.iscomplexobj(before) else np.float64
    left, right = (torch.from_numpy(np.asarray(each, dtype=dtype)) for each in (before, after))
    largest = float((right - left).abs().max()) if left.numel() else 0.0
    return msgspec.structs.replace(change, error=number(relative_error(left, right)), max_abs=number(largest))


def _type(constant: Constant) -> str:
    if constant.tensor is None:
        return "sparse"
    return f"{onnx_dtype_name(constant.tensor.data_type)}{list(constant.tensor.dims)}"
