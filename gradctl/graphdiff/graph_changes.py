"""Changes of the nodes without a counterpart, and differences of the nodes that have one.

Nodes without a counterpart, of both graphs, form a region if they feed each other, if they use the same weights, and if
both compute one value: one of the same name, or one that the same input of matched nodes uses. Nodes that depend only
on constants and sizes are kept apart from the rest, otherwise the arithmetic of shapes would connect the whole graph.
Each region is one change. In two numbered cases it includes a matched neighbour: 1. a region that was fused into the
node before it (BatchNorm into Conv), 2. into the node after it (Pad into Conv): that node has other weights or
attributes then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx

from gradctl.core.structure import ChangeKind, Difference, GraphChange, GraphNode
from gradctl.graphdiff.graph_view import GraphView, Source, operator_of
from gradctl.graphdiff.node_matching import Matching, group_by_weights

_OF_SIZES = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class _Region:
    """Nodes of both graphs, by position, that correspond to each other."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Changes:
    """The changes of two matched graphs, and the values that they share.

    Args:
        found: the pairs of nodes; pairs that become part of a region are removed.
        constants: the pairs of constants.
    """

    def __init__(self, found: Matching, constants: Mapping[int, int]) -> None:
        self.found, self.constants = found, constants
        self._absorb()
        self._regions = self._find_regions()
        self._number = {
            (side, place): number
            for number, region in enumerate(self._regions)
            for side, places in (("a", region.before), ("b", region.after))
            for place in places
        }
        self._a, self._b = found.a.view, found.b.view

    def __iter__(self) -> Iterator[GraphChange]:
        for region in self._regions:
            yield GraphChange(
                kind=self._kind(region),
                before=tuple(graph_node(self._a, place) for place in region.before),
                after=tuple(graph_node(self._b, place) for place in region.after),
            )
        for one, other in sorted(self.found.to_b.items()):
            rewired, attributes = self._rewired(one, other), self._attributes(one, other)
            if rewired or attributes:
                kind: ChangeKind = (
                    "rewired" if not attributes else "attributes" if not rewired else "rewired, attributes"
                )
                yield GraphChange(
                    kind=kind,
                    before=(graph_node(self._a, one),),
                    after=(graph_node(self._b, other),),
                    differences=(*rewired, *attributes),
                )
        outputs = [
            Difference(what=f"output {place}", before=self._a.name_of(reference), after=self._b.name_of(candidate))
            for place, reference, candidate in self.found.outputs()
            if not self._agree(reference, candidate)
        ]
        if outputs:
            yield GraphChange(kind="rewired", differences=tuple(outputs))

    def values(self) -> list[tuple[Source, Source]]:
        """Return the values of nodes that both graphs have, in the order of the first."""
        pairs: dict[Source, Source] = {}
        for one, other in self.found.to_b.items():
            outputs = zip(self._a.nodes[one].output, self._b.nodes[other].output, strict=False)
            for slot, names in enumerate(outputs):
                if all(names):
                    pairs[Source("node", one, slot)] = Source("node", other, slot)
        for reference, candidate in self._boundary():
            if reference.kind == candidate.kind == "node" and self._agree(reference, candidate):
                pairs.setdefault(reference, candidate)
        if self.found.names_proven:
            for reference, candidate in self._values_of_one_name():
                pairs.setdefault(reference, candidate)
        return sorted(pairs.items())

    def _kind(self, region: _Region) -> ChangeKind:
        before, after = region.before, region.after
        if before and after:
            return (
                "fused" if len(before) > len(after) == 1 else "split" if len(before) == 1 < len(after) else "replaced"
            )
        if not before:
            return "added"
        exits = _exits(self.found, before)
        if exits and all(candidate.kind == "constant" for _, candidate in exits):
            return "folded"
        return "merged" if exits and all(itertools.starmap(self._is_same, exits)) else "removed"

    def _absorb(self) -> None:
        """Remove the pairs of cases 1 and 2, in both directions."""
        for found in (self.found, self.found.swapped()):
            constant = _depends_on_constants(found.a.view)
            for region in _one_sided(found):
                partners = (_node_before(found, region), _node_after(found, region, constant))
                changed = [each for each in partners if each is not None and _is_other(found, each)]
                if changed:
                    found.unpair(changed[0])

    def _find_regions(self) -> list[_Region]:
        found, graph = self.found, networkx.Graph()
        shared = self._values_of_one_name()
        separate = {("a", reference) for reference, _ in shared} | {("b", candidate) for _, candidate in shared}
        for (letter, side, matched), group in zip(found.sides(), group_by_weights(found), strict=True):
            graph.add_nodes_from((letter, place) for place in range(len(side.view.nodes)) if place not in matched)
            graph.add_edges_from(((letter, place), ("weights", number)) for place, number in group.items())
            for maker, place, source in _connected(side.view, matched, group):
                if (letter, source) not in separate:
                    graph.add_edge((letter, maker), (letter, place))
        for reference, candidate in (*shared, *self._boundary()):
            if found.is_unmatched(reference, "a") and found.is_unmatched(candidate, "b"):
                graph.add_edge(("a", reference.place), ("b", candidate.place))
        regions = [
            _Region(*(tuple(sorted(place for side, place in component if side == letter)) for letter in "ab"))
            for component in networkx.connected_components(graph)
        ]
        return sorted(regions, key=lambda region: (min(region.before, default=len(found.a.view.nodes)), region.after))

    def _values_of_one_name(self) -> list[tuple[Source, Source]]:
        """Return the values of the same name that unmatched nodes compute, if names are kept."""
        found = self.found
        if not found.names_kept:
            return []
        named = {
            name: Source("node", place, slot)
            for place, node in enumerate(found.b.view.nodes)
            for slot, name in enumerate(node.output)
            if name and place not in found.to_a
        }
        return [
            (Source("node", place, slot), named[name])
            for place, node in enumerate(found.a.view.nodes)
            for slot, name in enumerate(node.output)
            if name in named and place not in found.to_b
        ]

    def _boundary(self) -> Iterator[tuple[Source, Source]]:
        """Yield the sources in both graphs of each input of matched nodes, and of each output."""
        for one, other in self.found.to_b.items():
            yield from zip(self.found.a.view.inputs[one], self.found.b.view.inputs[other], strict=False)
        yield from ((reference, candidate) for _, reference, candidate in self.found.outputs())

    def _rewired(self, one: int, other: int) -> list[Difference]:
        reference, candidate = self._a.inputs[one], self._b.inputs[other]
        nothing = Source("none")
        differences = []
        for slot in range(max(len(reference), len(candidate))):
            left, right = (side[slot] if slot < len(side) else nothing for side in (reference, candidate))
            if not self._agree(left, right):
                names = self._a.name_of(left) or None, self._b.name_of(right) or None
                differences.append(Difference(what=f"input {slot}", before=names[0], after=names[1]))
        return differences

    def _attributes(self, one: int, other: int) -> list[Difference]:
        reference, candidate = self.found.a.attributes[one], self.found.b.attributes[other]
        return [
            Difference(what=name, before=self.found.a.attribute(one, name), after=self.found.b.attribute(other, name))
            for name in sorted({*reference, *candidate})
            if reference.get(name, ("", None))[1] != candidate.get(name, ("", None))[1]
        ]

    def _agree(self, reference: Source, candidate: Source) -> bool:
        """Return whether two sources are the same, or differ only because of a region, which is reported itself."""
        if self._is_same(reference, candidate):
            return True
        if "none" in (reference.kind, candidate.kind):
            return False
        is_left, is_right = self.found.is_unmatched(reference, "a"), self.found.is_unmatched(candidate, "b")
        if not is_left and not is_right:
            return False
        if "constant" in (reference.kind, candidate.kind):
            return True
        if is_left and is_right:
            return self._number["a", reference.place] == self._number["b", candidate.place]
        entries = _entries(self._a, self.found.to_b, reference), _entries(self._b, self.found.to_a, candidate)
        return any(self._is_same(left, right) for left in entries[0] for right in entries[1])

    def _is_same(self, reference: Source, candidate: Source) -> bool:
        if reference.kind != candidate.kind:
            return False
        if reference.kind == "node":
            one, other = reference.place, candidate.place
            is_same = self.found.to_b.get(one) == other or self.found.a.computed[one] == self.found.b.computed[other]
            return is_same and reference.slot == candidate.slot
        if reference.kind == "constant":
            one, other = reference.place, candidate.place
            is_equal = self.found.a.view.constants[one].digest == self.found.b.view.constants[other].digest
            return is_equal or self.constants.get(one) == other
        if reference.kind == "input":
            return self.found.a.inputs[reference.place] == self.found.b.inputs[candidate.place]
        return reference.kind == "none" or self.found.a.outer(str(reference.of)) == self.found.b.outer(
            str(candidate.of)
        )


def graph_node(view: GraphView, place: int) -> GraphNode:
    """Return a node for a report."""
    node = view.nodes[place]
    value = next((name for name in node.output if name), "")
    return GraphNode(operator=operator_of(node), name=node.name, value=value)


def _depends_on_constants(view: GraphView) -> list[bool]:
    """Return whether each node computes from constants and sizes alone."""
    constant: list[bool] = []
    for node, sources, captured in zip(view.nodes, view.inputs, view.captured, strict=True):
        are_constant = (
            each.kind in ("constant", "none") or (each.kind == "node" and constant[each.place]) for each in sources
        )
        constant.append(operator_of(node) in _OF_SIZES or (not captured and all(are_constant)))
    return constant


def _connected(
    view: GraphView, matched: Mapping[int, int], group: Mapping[int, int]
) -> Iterator[tuple[int, int, Source]]:
    """Yield the unmatched nodes of one region that feed each other, and the value between them.

    Nodes that depend on constants alone are kept apart from others, and so are nodes with different weights.
    """
    constant = _depends_on_constants(view)
    sources = ((*used, *captured) for used, captured in zip(view.inputs, view.captured, strict=True))
    for place, source in _unmatched_sources(sources, matched):
        groups = {group[each] for each in (place, source.place) if each in group}
        if constant[place] == constant[source.place] and len(groups) < 2:
            yield source.place, place, source


def _unmatched_sources(sources: Iterable[Iterable[Source]], matched: Mapping[int, int]) -> Iterator[tuple[int, Source]]:
    """Yield unmatched nodes, each with each of its sources that an unmatched node computes."""
    for place, used in enumerate(sources):
        if place not in matched:
            yield from ((place, each) for each in used if each.kind == "node" and each.place not in matched)


def _entries(view: GraphView, matched: Mapping[int, int], source: Source) -> set[Source]:
    """Return the sources from which one is computed by nodes without a counterpart."""
    found: set[Source] = set()
    seen: set[Source] = set()
    pending = [source]
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.kind == "node" and each.place not in matched:
            pending += view.inputs[each.place]
        else:
            found.add(each)
    return found


def _one_sided(found: Matching) -> list[tuple[int, ...]]:
    """Return the connected unmatched nodes of the first graph that no unmatched node of the second replaces."""
    graph = networkx.Graph()
    graph.add_nodes_from(place for place in range(len(found.a.view.nodes)) if place not in found.to_b)
    graph.add_edges_from((place, each.place) for place, each in _unmatched_sources(found.a.view.inputs, found.to_b))
    components = (tuple(sorted(component)) for component in networkx.connected_components(graph))
    return [
        component
        for component in components
        if not any(found.is_unmatched(candidate, "b") for _, candidate in _exits(found, component))
    ]


def _exits(found: Matching, places: Iterable[int]) -> list[tuple[Source, Source]]:
    """Return the values of these nodes that matched nodes use, and those that the counterparts use instead."""
    exits: list[tuple[Source, Source]] = []
    outputs = dict(zip(found.b.outputs, found.b.view.outputs, strict=True))
    for place in sorted(places):
        for each in found.a.view.consumers[place]:
            reference = Source("node", place, each.output)
            if each.node < 0 and found.a.outputs[each.slot] in outputs:
                exits.append((reference, outputs[found.a.outputs[each.slot]]))
            elif each.node in found.to_b and each.slot >= 0:
                given = found.b.view.inputs[found.to_b[each.node]]
                exits.append((reference, given[each.slot] if each.slot < len(given) else Source("none")))
    return exits


def _is_other(found: Matching, place: int) -> bool:
    """Return whether a matched node and its counterpart differ in constants, attributes, or number of inputs."""
    other = found.to_b[place]
    reference, candidate = found.a.view.inputs[place], found.b.view.inputs[other]
    if len(reference) != len(candidate) or found.a.identities(place) != found.b.identities(other):
        return True
    digests = dict(found.b.constants(other))
    return any(digests.get(slot, digest) != digest for slot, digest in found.a.constants(place))


def _node_before(found: Matching, region: tuple[int, ...]) -> int | None:
    """Case 1: return the one node that feeds a region, if its counterpart replaces the region."""
    sources = {each for place in region for each in found.a.view.inputs[place] if each.kind != "constant"}
    inside = set(region)
    feeding = {each for each in sources if each.kind != "node" or each.place not in inside}
    exits = {candidate for _, candidate in _exits(found, region)}
    if len(feeding) != 1 or len(exits) != 1:
        return None
    (source,), (instead,) = feeding, exits
    is_replaced = source.kind == instead.kind == "node" and found.to_b.get(source.place) == instead.place
    return source.place if is_replaced else None


def _node_after(found: Matching, region: tuple[int, ...], constant: Sequence[bool]) -> int | None:
    """Case 2: return the one node that a region feeds; ``constant`` marks nodes that depend on constants alone."""
    fed = {each.node for place in region for each in found.a.view.consumers[place]} - set(region)
    if len(fed) != 1 or not fed <= found.to_b.keys() or all(constant[place] for place in region):
        return None
    return next(iter(fed))
