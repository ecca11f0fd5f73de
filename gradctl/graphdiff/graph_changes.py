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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networkx

from gradctl.core.structure import ChangeKind, Difference, GraphChange, GraphNode
from gradctl.graphdiff.graph_view import GraphView, Source, operator_of
from gradctl.graphdiff.node_colours import Side
from gradctl.graphdiff.node_matching import Matching, group_by_weights

_OF_SIZES = ("Shape", "Size")
# Whether the inputs of a matched node differ, and its attributes → the change.
_KINDS_OF_PAIRS: dict[tuple[bool, bool], ChangeKind] = {
    (True, False): "rewired",
    (False, True): "attributes",
    (True, True): "rewired, attributes",
}


# The nodes of both graphs, by position, that correspond to each other.
_Region = tuple[tuple[int, ...], tuple[int, ...]]


class PlacedChange(NamedTuple):
    """A change by the positions of its nodes in both graphs."""

    kind: ChangeKind
    before: Sequence[int]
    after: Sequence[int]
    differences: Sequence[Difference] = ()


class Changes:
    """The changes of two matched graphs, and the values that they share.

    Args:
        found: the pairs of nodes; pairs that become part of a region are removed.
        constants: the pairs of constants.

    Attributes:
        placed: the changes by position; one of the graph's outputs alone has no nodes.
    """

    def __init__(self, found: Matching, constants: Mapping[int, int]) -> None:
        self.found, self.constants = found, constants
        self.a, self.b = found.a, found.b
        self._absorb()
        self._regions = self._find_regions()
        self._number = {
            (side, place): number
            for number, region in enumerate(self._regions)
            for side, places in zip((self.a, self.b), region, strict=True)
            for place in places
        }
        self.placed = list(self._placed())

    def __iter__(self) -> Iterator[GraphChange]:
        return map(self._change, self.placed)

    def _placed(self) -> Iterator[PlacedChange]:
        for region in self._regions:
            yield PlacedChange(self._kind(region), *region)
        for one, other in sorted(self.found.to_b.items()):
            rewired, attributes = self._rewired(one, other), self._attributes(one, other)
            kind = _KINDS_OF_PAIRS.get((bool(rewired), bool(attributes)))
            if kind is not None:
                yield PlacedChange(kind, [one], [other], rewired + attributes)
        outputs = [
            self._difference(f"output {place}", reference, candidate)
            for place, reference, candidate in self.found.outputs()
            if not self._agree(reference, candidate)
        ]
        if outputs:
            yield PlacedChange("rewired", (), (), outputs)

    def values(self) -> list[tuple[Source, Source]]:
        """Return the values of nodes that both graphs have, in the order of the first."""
        pairs: dict[Source, Source] = {}
        for one, other in self.found.to_b.items():
            outputs = zip(self.a.view.nodes[one].output, self.b.view.nodes[other].output, strict=False)
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

    def _change(self, placed: PlacedChange) -> GraphChange:
        return GraphChange(
            kind=placed.kind,
            before=tuple(graph_node(self.a.view, place) for place in placed.before),
            after=tuple(graph_node(self.b.view, place) for place in placed.after),
            differences=tuple(placed.differences),
        )

    def _kind(self, region: _Region) -> ChangeKind:
        match [len(places) for places in region]:
            case 0, _:
                return "added"
            case _, 0:
                return self._kind_without_nodes_after(region[0])
            case 1, after if after > 1:
                return "split"
            case before, 1 if before > 1:
                return "fused"
        return "replaced"

    def _kind_without_nodes_after(self, before: tuple[int, ...]) -> ChangeKind:
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
        regions = []
        for component in networkx.connected_components(self._correspondence()):
            before, after = (sorted(at for each, at in component if each is side) for side in (self.a, self.b))
            regions.append((tuple(before), tuple(after)))
        return sorted(regions, key=lambda region: (min(region[0], default=len(self.a.view.nodes)), region[1]))

    def _correspondence(self) -> networkx.Graph:
        """Return the graph of the unmatched nodes ``(side, place)`` of both graphs, connected as regions are."""
        graph = networkx.Graph()
        shared = self._values_of_one_name()
        weights = {node: number for number, group in enumerate(group_by_weights(self.found)) for node in group}
        graph.add_edges_from((node, ("weights", number)) for node, number in weights.items())
        separate = {each for pair in shared for each in zip((self.a, self.b), pair, strict=True)}
        for side in (self.a, self.b):
            graph.add_nodes_from((side, place) for place in side.unmatched())
            graph.add_edges_from(_edges(side, weights, separate))
        for reference, candidate in (*shared, *self._boundary()):
            if self.found.are_unmatched(reference, candidate):
                graph.add_edge((self.a, reference.place), (self.b, candidate.place))
        return graph

    def _values_of_one_name(self) -> list[tuple[Source, Source]]:
        """Return the values of the same name that unmatched nodes compute, if names are kept."""
        if not self.found.names_kept:
            return []
        reference, candidate = _unmatched_values(self.a), _unmatched_values(self.b)
        return [(reference[name], candidate[name]) for name in reference if name in candidate]

    def _boundary(self) -> Iterator[tuple[Source, Source]]:
        """Yield the sources in both graphs of each input of matched nodes, and of each output."""
        yield from itertools.chain.from_iterable(map(self.found.inputs, self.found.to_b))
        yield from ((reference, candidate) for _, reference, candidate in self.found.outputs())

    def _rewired(self, one: int, other: int) -> list[Difference]:
        inputs = itertools.zip_longest(self.a.view.inputs[one], self.b.view.inputs[other], fillvalue=Source("none"))
        return [
            self._difference(f"input {slot}", reference, candidate)
            for slot, (reference, candidate) in enumerate(inputs)
            if not self._agree(reference, candidate)
        ]

    def _difference(self, what: str, reference: Source, candidate: Source) -> Difference:
        before, after = self.a.view.name_of(reference), self.b.view.name_of(candidate)
        return Difference(what=what, before=before or None, after=after or None)

    def _attributes(self, one: int, other: int) -> list[Difference]:
        reference, candidate = self.a.identities(one), self.b.identities(other)
        return [
            Difference(what=name, before=self.a.attribute(one, name), after=self.b.attribute(other, name))
            for name in sorted({*reference, *candidate})
            if reference.get(name) != candidate.get(name)
        ]

    def _agree(self, reference: Source, candidate: Source) -> bool:
        """Return whether two sources are the same, or differ only because of a region, which is reported itself."""
        if self._is_same(reference, candidate):
            return True
        if "none" in (reference.kind, candidate.kind):
            return False
        is_left, is_right = self.a.is_unmatched(reference), self.b.is_unmatched(candidate)
        if not is_left and not is_right:
            return False
        if "constant" in (reference.kind, candidate.kind):
            return True
        if is_left and is_right:
            return self._number[self.a, reference.place] == self._number[self.b, candidate.place]
        return any(
            itertools.starmap(
                self._is_same, itertools.product(_entries(self.a, reference), _entries(self.b, candidate))
            )
        )

    def _is_same(self, reference: Source, candidate: Source) -> bool:
        pairs: Mapping[Any, int] = {"node": self.found.to_b, "constant": self.constants}.get(reference.kind, {})
        if candidate == reference._replace(of=pairs.get(reference.of, "no counterpart")):
            return True
        return self.a.identity(reference, self.a.computed) == self.b.identity(candidate, self.b.computed)


def graph_node(view: GraphView, place: int) -> GraphNode:
    """Return a node for a report."""
    node = view.nodes[place]
    value = next((name for name in node.output if name), "")
    return GraphNode(operator=operator_of(node), name=node.name, value=value)


def _unmatched_values(side: Side) -> dict[str, Source]:
    """Return the values that nodes without a counterpart compute, by name."""
    outputs = (
        (place, slot, name) for place in side.unmatched() for slot, name in enumerate(side.view.nodes[place].output)
    )
    return {name: Source("node", place, slot) for place, slot, name in outputs if name}


def _depends_on_constants(view: GraphView) -> list[bool]:
    """Return whether each node computes from constants and sizes alone."""
    constant: list[bool] = []
    for node, sources, captured in zip(view.nodes, view.inputs, view.captured, strict=True):
        are_constant = (
            each.kind in ("constant", "none") or (each.kind == "node" and constant[each.place]) for each in sources
        )
        constant.append(operator_of(node) in _OF_SIZES or (not captured and all(are_constant)))
    return constant


def _edges(
    side: Side, weights: Mapping[tuple[Side, int], int], separate: Collection[tuple[Side, Source]]
) -> Iterator[tuple[tuple[Side, int], tuple[Side, int]]]:
    """Yield the pairs of unmatched nodes of one graph that belong to one region since one uses a value of the other.

    Nodes that depend on constants alone are kept apart from others, and so are nodes with different weights.

    Args:
        side: the graph.
        weights: a number for each group of nodes that use the same weights.
        separate: values that separate regions.
    """
    constant = _depends_on_constants(side.view)
    sources = [(*used, *captured) for used, captured in zip(side.view.inputs, side.view.captured, strict=True)]
    for place, source in _unmatched_sources(side, sources):
        groups = {weights[side, each] for each in (place, source.place) if (side, each) in weights}
        if constant[place] == constant[source.place] and len(groups) < 2 and (side, source) not in separate:
            yield (side, source.place), (side, place)


def _unmatched_sources(side: Side, sources: Sequence[Iterable[Source]]) -> Iterator[tuple[int, Source]]:
    """Yield unmatched nodes, each with each of its sources that an unmatched node computes."""
    for place in side.unmatched():
        yield from ((place, each) for each in sources[place] if side.is_unmatched(each))


def _entries(side: Side, source: Source) -> set[Source]:
    """Return the sources from which one is computed by nodes without a counterpart."""
    seen: set[Source] = set()
    pending = [source]
    while pending:
        each = pending.pop()
        if each not in seen and side.is_unmatched(each):
            pending += side.view.inputs[each.place]
        seen.add(each)
    return {each for each in seen if not side.is_unmatched(each)}


def _one_sided(found: Matching) -> list[tuple[int, ...]]:
    """Return the connected unmatched nodes of the first graph that no unmatched node of the second replaces."""
    graph = networkx.Graph()
    graph.add_nodes_from(found.a.unmatched())
    graph.add_edges_from((place, each.place) for place, each in _unmatched_sources(found.a, found.a.view.inputs))
    components = (tuple(sorted(component)) for component in networkx.connected_components(graph))
    return [
        component
        for component in components
        if not any(found.b.is_unmatched(candidate) for _, candidate in _exits(found, component))
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
    inside = [("node", place) for place in region]
    inputs = found.a.view.inputs
    feeding = {each for at in region for each in inputs[at] if each.kind != "constant" and each[:2] not in inside}
    replacing = {candidate for _, candidate in _exits(found, region)}
    if (len(feeding), len(replacing)) != (1, 1):
        return None
    (source,), (instead,) = feeding, replacing
    are_nodes = source.kind == instead.kind == "node"
    return source.place if are_nodes and found.to_b.get(source.place) == instead.place else None


def _node_after(found: Matching, region: tuple[int, ...], constant: Sequence[bool]) -> int | None:
    """Case 2: return the one node that a region feeds; ``constant`` marks nodes that depend on constants alone."""
    fed = {each.node for place in region for each in found.a.view.consumers[place]} - set(region)
    if len(fed) != 1 or not fed <= found.to_b.keys() or all(constant[place] for place in region):
        return None
    return next(iter(fed))
