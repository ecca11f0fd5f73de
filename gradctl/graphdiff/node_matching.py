"""Matching of the nodes of two graphs.

By the colours of ``gradctl.graphdiff.node_colours`` and by the neighbours of matched nodes, in this order:

1. the same colours in both directions; 2. the same use; 3. the same computation;
4. the same colours in both directions, except for constants and attributes;
5. the same operator for a value of the same name, then for a node of the same name;
6. neighbours: the same operator next to matched nodes; then 2 and 3 as in 4, each followed by 6;
7. the same operator next to nodes that use the same weights, whatever these nodes are; then 6 again;
8. of equal nodes in a row, of which one graph has fewer, those with the same names.

Colours come before names because exporters number their values: a name in both graphs need not be the same value.
Names are used only if most of the nodes of cases 1 to 4 whose names are in both graphs have the same name; outputs of
the graph are ignored for that, since their names are its interface.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
import onnx

from gradctl.graphdiff.graph_view import Consumer, GraphView, Source, operator_of
from gradctl.graphdiff.node_colours import Palette, Side, colour_computations, colour_uses

_Key = Hashable


@dataclass(slots=True, eq=False)
class Matching:
    """Two graphs and the pairs of their nodes.

    Attributes:
        a, b: the graphs.
        to_b: positions of nodes of ``b`` by those of ``a``.
        to_a: the reverse.
        names_kept: whether names are used.
        names_proven: whether a pair that was found without names confirms them.
    """

    a: Side
    b: Side
    to_b: dict[int, int] = field(default_factory=dict)
    to_a: dict[int, int] = field(default_factory=dict)
    names_kept: bool = True
    names_proven: bool = False

    def pair(self, reference: int, candidate: int) -> None:
        """Match two nodes."""
        self.to_b[reference], self.to_a[candidate] = candidate, reference

    def unpair(self, reference: int) -> None:
        """Remove a pair."""
        del self.to_a[self.to_b.pop(reference)]

    def sides(self) -> tuple[tuple[str, Side, dict[int, int]], ...]:
        """Return both graphs, each with its letter and its matched nodes."""
        return ("a", self.a, self.to_b), ("b", self.b, self.to_a)

    def is_unmatched(self, source: Source, letter: str) -> bool:
        """Return whether a source of graph ``a`` or ``b`` is a node without a counterpart."""
        return source.kind == "node" and source.of not in (self.to_b if letter == "a" else self.to_a)

    def outputs(self) -> Iterator[tuple[int, Source, Source]]:
        """Yield the outputs that both graphs have: the position in the first, and both sources."""
        candidate = dict(zip(self.b.outputs, self.b.view.outputs, strict=True))
        for place, source in zip(self.a.outputs, self.a.view.outputs, strict=True):
            if place in candidate:
                yield place, source, candidate[place]

    def swapped(self) -> Matching:
        """Return the matching with the graphs exchanged."""
        return Matching(self.b, self.a, self.to_a, self.to_b, self.names_kept, self.names_proven)


def match_nodes(a: Side, b: Side) -> Matching:
    """Return the pairs of nodes of two graphs."""
    found = Matching(a, b)
    palette = Palette()
    sides = (a, b)
    for side in sides:
        side.computed = colour_computations(side, palette, exact=True)
    uses = [colour_uses(side, palette, exact=True) for side in sides]
    both = [list(zip(side.computed, use, strict=True)) for side, use in zip(sides, uses, strict=True)]
    _pair_classes(found, both[0], both[1], every=True)
    _pair_classes(found, uses[0], uses[1])
    _pair_classes(found, a.computed, b.computed)
    loose = [colour_computations(side, palette, exact=False) for side in sides]
    uses = [colour_uses(side, palette, exact=False) for side in sides]
    both = [list(zip(reference, use, strict=True)) for reference, use in zip(loose, uses, strict=True)]
    _pair_classes(found, both[0], both[1])
    found.names_kept, found.names_proven = _names_kept(found)
    _pair_names(found)
    _pair_neighbours(found)
    for left, right in (uses, loose):
        _pair_classes(found, left, right)
        _pair_neighbours(found)
    count = -1
    while count < len(found.to_b):
        count = len(found.to_b)
        _pair_beside_weights(found)
        _pair_neighbours(found)
    for each in (found, found.swapped()):
        _prefer_names(each)
    return found


def group_by_weights(found: Matching) -> tuple[dict[int, int], dict[int, int]]:
    """Return a number for each unmatched node of each graph that uses the same weights as one of the other graph.

    Nodes of one number correspond. A weight has more than one element, and one unmatched user in each graph.
    """
    users: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for letter, side, matched in found.sides():
        weights = {each.digest for each in side.view.constants if each.size > 1}
        for place in range(len(side.view.nodes)):
            for _, digest in side.constants(place) if place not in matched else ():
                if digest in weights:
                    users[digest].append((letter, place))
    graph = networkx.Graph(tuple(pair) for pair in users.values() if sorted(each[0] for each in pair) == ["a", "b"])
    groups: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for number, component in enumerate(networkx.connected_components(graph)):
        for letter, place in component:
            groups[letter == "b"][place] = number
    return groups


def _pair_beside_weights(found: Matching) -> None:
    """Case 7."""
    reference, candidate = (_members(group) for group in group_by_weights(found))
    for strict in (True, False):
        for number in reference:
            for neighbours in (_consumers, _producers):
                left = neighbours(found.a.view, reference[number])
                _pair_consumers(found, left, neighbours(found.b.view, candidate[number]), [], strict=strict)


def _members(groups: Mapping[int, int]) -> dict[int, set[int]]:
    members: dict[int, set[int]] = defaultdict(set)
    for place, number in groups.items():
        members[number].add(place)
    return members


def _consumers(view: GraphView, inside: set[int]) -> list[Consumer]:
    return [each for place in inside for each in view.consumers[place] if each.node not in inside]


def _producers(view: GraphView, inside: set[int]) -> list[Consumer]:
    """Return the nodes that feed others, each once; the input that they feed is irrelevant here."""
    makers = {source.place for place in inside for source in view.inputs[place] if source.kind == "node"}
    return [Consumer(place, 0, 0) for place in sorted(makers - inside)]


def _prefer_names(found: Matching) -> None:
    """Case 8: pair a node with the one of its name instead, if that is unmatched and computes the same."""
    if not found.names_kept:
        return
    free = {_first_output(node): place for place, node in enumerate(found.a.view.nodes) if place not in found.to_b}
    for one, other in list(found.to_b.items()):
        name = _first_output(found.b.view.nodes[other])
        namesake = free.get(name)
        if namesake is None or name == _first_output(found.a.view.nodes[one]):
            continue
        if found.a.computed[namesake] == found.b.computed[other]:
            found.unpair(one)
            found.pair(namesake, other)


def _pair_classes(
    found: Matching, reference: Sequence[_Key], candidate: Sequence[_Key], *, every: bool = False
) -> None:
    """Pair nodes with a unique colour; with ``every``, also equally many nodes of one colour, in their order."""
    left, right = _classes(reference, found.to_b), _classes(candidate, found.to_a)
    for colour, places in left.items():
        others = right.get(colour, [])
        if len(places) == len(others) and (every or len(places) == 1):
            for one, other in zip(places, others, strict=True):
                found.pair(one, other)


def _classes(colours: Sequence[_Key], matched: Mapping[int, int]) -> dict[_Key, list[int]]:
    classes: dict[_Key, list[int]] = defaultdict(list)
    for place, colour in enumerate(colours):
        if place not in matched and colour is not None:
            classes[colour].append(place)
    return classes


def _first_output(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


def _names_kept(found: Matching) -> tuple[bool, bool]:
    """Return whether to use names, which is the default without evidence, and whether there is evidence."""
    a, b = found.a.view, found.b.view
    candidate = {_first_output(node) for node in b.nodes}
    kept = [
        name == _first_output(b.nodes[other])
        for one, other in found.to_b.items()
        if (name := _first_output(a.nodes[one])) in candidate and all(each.node >= 0 for each in a.consumers[one])
    ]
    is_kept = 2 * sum(kept) >= len(kept)
    return is_kept, is_kept and bool(kept)


def _pair_names(found: Matching) -> None:
    """Case 5."""
    if not found.names_kept:
        return
    for name_of in (_first_output, lambda node: node.name):
        left, right = (
            [(operator_of(node), name_of(node)) if name_of(node) else None for node in side.view.nodes]
            for side in (found.a, found.b)
        )
        _pair_classes(found, left, right)


def _pair_neighbours(found: Matching) -> None:
    """Case 6: first those with the same attributes and constants, from all matched nodes outward, then the others."""
    for strict in (True, False):
        queue = list(found.to_b.items())
        outputs = [(reference, candidate) for _, reference, candidate in found.outputs()]
        _pair_producers(found, outputs, queue, strict=strict)
        _pair_consumers(found, _consumers_of_inputs(found.a), _consumers_of_inputs(found.b), queue, strict=strict)
        for one, other in queue:
            _pair_producers(
                found, zip(found.a.view.inputs[one], found.b.view.inputs[other], strict=False), queue, strict=strict
            )
            _pair_consumers(found, found.a.view.consumers[one], found.b.view.consumers[other], queue, strict=strict)


def _consumers_of_inputs(side: Side) -> list[Consumer]:
    """Return the consumers of the graph's inputs, each with the input's position as its output."""
    return [
        Consumer(place, slot, side.inputs[source.place])
        for place, given in enumerate(side.view.inputs)
        for slot, source in enumerate(given)
        if source.kind == "input"
    ]


def _pair_producers(
    found: Matching, sources: Iterable[tuple[Source, Source]], queue: list[tuple[int, int]], *, strict: bool
) -> None:
    for reference, candidate in sources:
        if (
            found.is_unmatched(reference, "a")
            and found.is_unmatched(candidate, "b")
            and reference.slot == candidate.slot
        ):
            one, other = reference.place, candidate.place
            if _trait(found.a, one, strict=strict) == _trait(found.b, other, strict=strict):
                found.pair(one, other)
                queue.append((one, other))


def _pair_consumers(
    found: Matching,
    reference: Iterable[Consumer],
    candidate: Iterable[Consumer],
    queue: list[tuple[int, int]],
    *,
    strict: bool,
) -> None:
    left, right = (
        [
            ((each.output, each.slot, _trait(side, each.node, strict=strict)), each.node)
            for each in consumers
            if each.node >= 0 and each.node not in matched
        ]
        for side, consumers, matched in ((found.a, reference, found.to_b), (found.b, candidate, found.to_a))
    )
    counts, others = Counter(key for key, _ in left), Counter(key for key, _ in right)
    places = dict(right)
    for key, one in left:
        if counts[key] == others[key] == 1 and one not in found.to_b and places[key] not in found.to_a:
            found.pair(one, places[key])
            queue.append((one, places[key]))


def _trait(side: Side, place: int, *, strict: bool) -> _Key:
    operator = operator_of(side.view.nodes[place])
    if not strict:
        return operator
    return operator, tuple(side.identities(place).items()), side.constants(place)
