"""What happened to the nodes that have no counterpart, and what is other about those that have one.

Nodes without a counterpart are put together, those of both graphs, where they feed each other, where they take the same
weights, and where both make one value: one of the same name, or one that the same input of matched nodes takes. What
computes from constants and sizes alone stays apart from the rest, or the arithmetic of shapes would tie the whole graph
together. Each such region is one change; two numbered cases take a matched neighbour along: 1. a region that went into
the node before it (BatchNorm into Conv), 2. into the node after it (Pad into Conv): that node has other weights or
attributes then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx

from gradctl.core.structure import ChangeKind, Difference, GraphChange, GraphNode
from gradctl.graphdiff.graph_view import GraphView, Source, operator_of
from gradctl.graphdiff.node_matching import Matching, of_same_weights

_OF_SIZES = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class _Region:
    """Nodes of both graphs, by place, which stand for each other."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Changes:
    """The changes of two matched graphs, and the values that they share.

    Args:
        found: the pairs of nodes; those that a region takes along are taken apart.
        constants: the pairs of constants.
    """

    def __init__(self, found: Matching, constants: Mapping[int, int]) -> None:
        self.found, self.constants = found, constants
        self._absorb()
        self._regions = self._components()
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
            Difference(what=f"output {place}", before=self._a.name_of(mine), after=self._b.name_of(theirs))
            for place, mine, theirs in self.found.outputs()
            if not self._agree(mine, theirs)
        ]
        if outputs:
            yield GraphChange(kind="rewired", differences=tuple(outputs))

    def values(self) -> list[tuple[Source, Source]]:
        """Return the values of nodes that are there in both graphs, in the order of the first."""
        pairs: dict[Source, Source] = {}
        for one, other in self.found.to_b.items():
            outputs = zip(self._a.nodes[one].output, self._b.nodes[other].output, strict=False)
            for slot, names in enumerate(outputs):
                if all(names):
                    pairs[Source("node", one, slot)] = Source("node", other, slot)
        for mine, theirs in self._boundary():
            if mine.kind == theirs.kind == "node" and self._agree(mine, theirs):
                pairs.setdefault(mine, theirs)
        if self.found.names_proven:
            for mine, theirs in self._of_one_name():
                pairs.setdefault(mine, theirs)
        return sorted(pairs.items())

    def _kind(self, region: _Region) -> ChangeKind:
        before, after = region.before, region.after
        if before and after:
            return (
                "fused" if len(before) > len(after) == 1 else "split" if len(after) > len(before) == 1 else "replaced"
            )
        if not before:
            return "added"
        exits = _exits(self.found, before)
        if exits and all(theirs.kind == "constant" for _, theirs in exits):
            return "folded"
        return "merged" if exits and all(self._is_same(mine, theirs) for mine, theirs in exits) else "removed"

    def _absorb(self) -> None:
        """Take apart the pairs of cases 1 and 2, in both directions."""
        for found in (self.found, self.found.swapped()):
            fixed = _of_constants(found.a.view)
            for region in _one_sided(found):
                partners = (_before_it(found, region), _after_it(found, region, fixed))
                changed = [each for each in partners if each is not None and _is_other(found, each)]
                if changed:
                    found.part(changed[0])

    def _components(self) -> list[_Region]:
        found = self.found
        regions = networkx.Graph()
        shared = self._of_one_name()
        cut = {("a", mine) for mine, _ in shared} | {("b", theirs) for _, theirs in shared}
        groups = of_same_weights(found)
        for letter, side, matched, group in (
            ("a", found.a, found.to_b, groups[0]),
            ("b", found.b, found.to_a, groups[1]),
        ):
            fixed = _of_constants(side.view)
            for place, given in enumerate(side.view.inputs):
                if place in matched:
                    continue
                regions.add_node((letter, place))
                for source in (*given, *side.view.captured[place]):
                    if source.kind != "node" or int(source.of) in matched or (letter, source) in cut:
                        continue
                    maker = int(source.of)
                    is_apart = place in group and maker in group and group[place] != group[maker]
                    if fixed[place] == fixed[maker] and not is_apart:
                        regions.add_edge((letter, maker), (letter, place))
        for mine, theirs in (*shared, *self._boundary()):
            if mine.kind == theirs.kind == "node":
                one, other = int(mine.of), int(theirs.of)
                if one not in found.to_b and other not in found.to_a:
                    regions.add_edge(("a", one), ("b", other))
        for letter, group in zip("ab", groups, strict=True):
            regions.add_edges_from(((letter, place), ("weights", number)) for place, number in group.items())
        components = [
            _Region(*(tuple(sorted(place for side, place in component if side == letter)) for letter in "ab"))
            for component in networkx.connected_components(regions)
        ]
        return sorted(
            components, key=lambda region: (min(region.before, default=len(found.a.view.nodes)), region.after)
        )

    def _of_one_name(self) -> list[tuple[Source, Source]]:
        """Return the values of one name that unmatched nodes make, where names are kept."""
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
        """Give what the same input of matched nodes, and the same output of the graphs, takes in each."""
        for one, other in self.found.to_b.items():
            yield from zip(self.found.a.view.inputs[one], self.found.b.view.inputs[other], strict=False)
        yield from ((mine, theirs) for _, mine, theirs in self.found.outputs())

    def _rewired(self, one: int, other: int) -> list[Difference]:
        mine, theirs = self._a.inputs[one], self._b.inputs[other]
        nothing = Source("none")
        differences = []
        for slot in range(max(len(mine), len(theirs))):
            left, right = (side[slot] if slot < len(side) else nothing for side in (mine, theirs))
            if not self._agree(left, right):
                names = self._a.name_of(left) or None, self._b.name_of(right) or None
                differences.append(Difference(what=f"input {slot}", before=names[0], after=names[1]))
        return differences

    def _attributes(self, one: int, other: int) -> list[Difference]:
        mine, theirs = self.found.a.attributes[one], self.found.b.attributes[other]
        return [
            Difference(
                what=name,
                before=self.found.a.attribute(one, name),
                after=self.found.b.attribute(other, name),
            )
            for name in sorted({*mine, *theirs})
            if mine.get(name, ("", None))[1] != theirs.get(name, ("", None))[1]
        ]

    def _agree(self, mine: Source, theirs: Source) -> bool:
        """Return whether two sources are the same, or other only because of a region that says so itself."""
        if self._is_same(mine, theirs):
            return True
        if "none" in (mine.kind, theirs.kind):
            return False
        is_left = mine.kind == "node" and int(mine.of) not in self.found.to_b
        is_right = theirs.kind == "node" and int(theirs.of) not in self.found.to_a
        if not is_left and not is_right:
            return False
        if (is_left and theirs.kind == "constant") or (is_right and mine.kind == "constant"):
            return True
        if is_left and is_right:
            return self._number["a", int(mine.of)] == self._number["b", int(theirs.of)]
        entries = _entries(self._a, self.found.to_b, mine), _entries(self._b, self.found.to_a, theirs)
        return any(self._is_same(left, right) for left in entries[0] for right in entries[1])

    def _is_same(self, mine: Source, theirs: Source) -> bool:
        if mine.kind != theirs.kind:
            return False
        if mine.kind == "node":
            one, other = int(mine.of), int(theirs.of)
            is_same = self.found.to_b.get(one) == other or self.found.a.computed[one] == self.found.b.computed[other]
            return is_same and mine.slot == theirs.slot
        if mine.kind == "constant":
            one, other = int(mine.of), int(theirs.of)
            is_equal = self.found.a.view.constants[one].digest == self.found.b.view.constants[other].digest
            return is_equal or self.constants.get(one) == other
        if mine.kind == "input":
            return self.found.a.inputs[int(mine.of)] == self.found.b.inputs[int(theirs.of)]
        return mine.kind == "none" or self.found.a.outer(str(mine.of)) == self.found.b.outer(str(theirs.of))


def graph_node(view: GraphView, place: int) -> GraphNode:
    """Return how a report names a node."""
    node = view.nodes[place]
    value = next((name for name in node.output if name), "")
    return GraphNode(operator=operator_of(node), name=node.name, value=value)


def _of_constants(view: GraphView) -> list[bool]:
    """Return whether each node computes from constants and sizes alone."""
    fixed: list[bool] = []
    for place, given in enumerate(view.inputs):
        fixed.append(
            operator_of(view.nodes[place]) in _OF_SIZES
            or (
                not view.captured[place]
                and all(
                    source.kind in ("constant", "none") or (source.kind == "node" and fixed[int(source.of)])
                    for source in given
                )
            )
        )
    return fixed


def _entries(view: GraphView, matched: Mapping[int, int], source: Source) -> set[Source]:
    """Return the sources that stand behind one, through nodes without a counterpart."""
    found: set[Source] = set()
    seen: set[Source] = set()
    pending = [source]
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.kind == "node" and int(each.of) not in matched:
            pending += view.inputs[int(each.of)]
        else:
            found.add(each)
    return found


def _one_sided(found: Matching) -> list[tuple[int, ...]]:
    """Return the connected nodes of the first graph without a counterpart, which none of the second stand for."""
    graph = networkx.Graph()
    for place, given in enumerate(found.a.view.inputs):
        if place not in found.to_b:
            graph.add_node(place)
            graph.add_edges_from(
                (place, int(source.of))
                for source in given
                if source.kind == "node" and int(source.of) not in found.to_b
            )
    components = (tuple(sorted(component)) for component in networkx.connected_components(graph))
    return [
        component
        for component in components
        if not any(theirs.kind == "node" and int(theirs.of) not in found.to_a for _, theirs in _exits(found, component))
    ]


def _exits(found: Matching, places: Iterable[int]) -> list[tuple[Source, Source]]:
    """Return the values of these nodes that matched nodes take, and what their counterparts take instead."""
    exits: list[tuple[Source, Source]] = []
    outputs = dict(zip(found.b.outputs, found.b.view.outputs, strict=True))
    for place in sorted(places):
        for each in found.a.view.consumers[place]:
            mine = Source("node", place, each.output)
            if each.node < 0 and found.a.outputs[each.slot] in outputs:
                exits.append((mine, outputs[found.a.outputs[each.slot]]))
            elif each.node in found.to_b and each.slot >= 0:
                given = found.b.view.inputs[found.to_b[each.node]]
                exits.append((mine, given[each.slot] if each.slot < len(given) else Source("none")))
    return exits


def _is_other(found: Matching, place: int) -> bool:
    """Return whether a matched node has other constants, attributes, or number of inputs than its counterpart."""
    other = found.to_b[place]
    mine, theirs = found.a.view.inputs[place], found.b.view.inputs[other]
    if len(mine) != len(theirs) or found.a.identities(place) != found.b.identities(other):
        return True
    return any(
        one.kind == another.kind == "constant"
        and found.a.view.constants[int(one.of)].digest != found.b.view.constants[int(another.of)].digest
        for one, another in zip(mine, theirs, strict=True)
    )


def _before_it(found: Matching, region: tuple[int, ...]) -> int | None:
    """Case 1: return the one node that feeds a region and whose counterpart feeds instead of it."""
    inside = set(region)
    given = [source for place in region for source in found.a.view.inputs[place] if source.kind != "constant"]
    feeding = {source for source in given if source.kind != "node" or int(source.of) not in inside}
    exits = {theirs for _, theirs in _exits(found, region)}
    if len(feeding) != 1 or len(exits) != 1:
        return None
    (source,), (instead,) = feeding, exits
    if source.kind != "node" or instead.kind != "node" or found.to_b.get(int(source.of)) != int(instead.of):
        return None
    return int(source.of)


def _after_it(found: Matching, region: tuple[int, ...], fixed: Sequence[bool]) -> int | None:
    """Case 2: return the one node that a region feeds; ``fixed`` tells nodes that compute from constants alone."""
    inside = set(region)
    fed = {each.node for place in region for each in found.a.view.consumers[place] if each.node not in inside}
    if len(fed) != 1 or not fed <= found.to_b.keys() or all(fixed[place] for place in region):
        return None
    return next(iter(fed))
