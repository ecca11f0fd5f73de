"""How two graphs differ, in a few lines for screen and Markdown; equal nodes are only counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from gradctl.core.numbers import format_number
from gradctl.core.structure import Difference, GraphChange, GraphNode, InitializerChange, InitializerKind, Structure

_MOST_CHANGES = 6
_MOST_INITIALIZERS = 3
_MOST_DIFFERENCES = 3
_MOST_OPERATORS = 5
# Operators without computation, which are only counted.
_TRANSPARENT = ("Identity", "Constant")
_KINDS: tuple[InitializerKind, ...] = ("changed", "removed", "added")


def structure_lines(structure: Structure) -> list[str]:
    """Return how two graphs differ: a headline, and about ten lines at most."""
    aside = _aside(structure)
    initializers = _pair(structure.initializers_before, structure.initializers_after)
    count = f"{structure.nodes_before} nodes, {initializers} initializers"
    if not (structure.changes or structure.initializers or structure.model):
        rest = f" except for nodes without computation: {count}; {', '.join(aside)}" if aside else f": {count}"
        return [f"the graphs are equal{rest}"]
    nodes = _pair(structure.nodes_before, structure.nodes_after)
    headline = f"graph: {nodes} nodes, {structure.matched} of them matched; {initializers} initializers"
    lines = [*_changes(structure.changes), *_initializers(structure.initializers), *_model(structure.model)]
    lines += ["; ".join(aside)] if aside else []
    lines += [f"and {structure.omitted} more changes, which are not in the report"] if structure.omitted else []
    return [headline, *lines]


def _aside(structure: Structure) -> list[str]:
    counts = [
        f"{kind} {_pair(structure.operators_before.get(kind, 0), structure.operators_after.get(kind, 0))}"
        for kind in _TRANSPARENT
        if structure.operators_before.get(kind, 0) != structure.operators_after.get(kind, 0)
    ]
    counts += [f"{structure.renamed} values renamed"] if structure.renamed else []
    return counts + ([f"{structure.moved} constants renamed or moved"] if structure.moved else [])


def _changes(changes: Sequence[GraphChange]) -> list[str]:
    groups: dict[Hashable, list[GraphChange]] = {}
    for change in changes:
        groups.setdefault(_likeness(change), []).append(change)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [_group(group) for group in ordered[:_MOST_CHANGES]]
    more = sum(len(group) for group in ordered[_MOST_CHANGES:])
    return lines + ([f"and {more} more changes of nodes (--format json has them all)"] if more else [])


def _likeness(change: GraphChange) -> Hashable:
    attributes = tuple(each for each in change.differences if not _is_rewired(each))
    sides = tuple(_operators(side) for side in (change.before, change.after))
    return change.kind, sides, attributes, tuple(each.what for each in change.differences)


def _group(group: Sequence[GraphChange]) -> str:
    """Return ``12 x fused MatMul + Add -> Gemm``; for a single change, its names and values too."""
    change = group[0]
    if len(group) == 1:
        name = "".join(f" {_name(node)}" for node in (*change.before, *change.after)[:1])
        inside = f" (in {change.inside})" if change.inside else ""
        return f"{change.kind} {_kinds(change)}{name}{_listed(change.differences)}{inside}"
    shared = [each for each in change.differences if not _is_rewired(each)]
    return f"{len(group)} x {change.kind} {_kinds(change)}{_listed(shared)}"


def _kinds(change: GraphChange) -> str:
    before, after = _operators(change.before), _operators(change.after)
    return f"{before} -> {after}" if before and after and not change.differences else before or after


def _listed(differences: Sequence[Difference]) -> str:
    return f": {_differences(differences)}" if differences else ""


def _operators(nodes: Iterable[GraphNode]) -> str:
    counts = Counter(node.operator for node in nodes)
    texts = [kind if count == 1 else f"{count} {kind}" for kind, count in counts.items()]
    more = [f"{len(texts) - _MOST_OPERATORS} more kinds"] if len(texts) > _MOST_OPERATORS else []
    return " + ".join(texts[:_MOST_OPERATORS] + more)


def _name(node: GraphNode) -> str:
    return f"'{node.name}'" if node.name else f"of {node.value}"


def _is_rewired(difference: Difference) -> bool:
    return difference.what.startswith(("input ", "output "))


def _differences(differences: Sequence[Difference]) -> str:
    texts = [
        f"{each.what} {'-' if each.before is None else each.before} to {'-' if each.after is None else each.after}"
        for each in differences[:_MOST_DIFFERENCES]
    ]
    more = [f"{len(differences) - _MOST_DIFFERENCES} more"] if len(differences) > _MOST_DIFFERENCES else []
    return ", ".join(texts + more)


def _initializers(changes: Sequence[InitializerChange]) -> list[str]:
    if not changes:
        return []
    counts = Counter(change.kind for change in changes)
    changed = [_changed(change) for change in changes if change.kind == "changed"]
    total = ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind])
    return [f"constants: {total}", *(f"  {line}" for line in changed[:_MOST_INITIALIZERS])]


def _changed(change: InitializerChange) -> str:
    name = change.name if change.name == change.name_after else f"{change.name} to {change.name_after}"
    if change.type_before != change.type_after:
        return f"{name} {change.type_before} to {change.type_after}"
    size = f" error {format_number(change.error)} (relative), max {format_number(change.max_abs)}"
    return f"{name} {change.type_before}" + (size if change.error is not None else " changed")


def _model(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    more = len(differences) - 2 * _MOST_DIFFERENCES
    texts = [_differences([each]) for each in differences[: 2 * _MOST_DIFFERENCES]]
    return ["; ".join(texts + ([f"{more} more"] if more > 0 else []))]


def _pair(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} to {after}"
