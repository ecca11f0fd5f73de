"""Which node of one graph is which of another.

By the colours of ``gradctl.graphdiff.node_colours`` and what is beside what is matched, in this order:

1. what has the same colours both ways; 2. the same use; 3. the same computation;
4. what has the same colours both ways but for constants and attributes;
5. the same operator for a value of the same name, then for a node of the same name;
6. neighbours: the same operator beside nodes that are matched; then 2 and 3 in the way of 4, each followed by 6;
7. the same operator beside nodes that take the same weights, whatever these nodes are; then 6 again;
8. of equal nodes in a row, of which one graph has fewer, those that kept their names.

Colours come before names because exporters number their values: a name that is there twice need not be the same value.
Names are believed only if most of the nodes of cases 1 to 4 whose names are in both graphs kept theirs; outputs of the
graph, whose names are its interface, say nothing of that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
import onnx

from gradctl.graphdiff.graph_view import Consumer, GraphView, Source, operator_of
from gradctl.graphdiff.node_colours import Palette, Side, computed, used

_Key = Hashable


@dataclass(slots=True, eq=False)
class Matching:
    """Two graphs and the pairs of their nodes.

    Attributes:
        a, b: the graphs.
        to_b: the node of ``b`` for one of ``a``, by place.
        to_a: the other way.
        names_kept: whether names are believed.
        names_proven: and a pair that was found without them has shown it.
    """

    a: Side
    b: Side
    to_b: dict[int, int] = field(default_factory=dict)
    to_a: dict[int, int] = field(default_factory=dict)
    names_kept: bool = True
    names_proven: bool = False

    def pair(self, mine: int, theirs: int) -> None:
        """Note that two nodes are the same."""
        self.to_b[mine], self.to_a[theirs] = theirs, mine

    def part(self, mine: int) -> None:
        """Take a pair apart."""
        del self.to_a[self.to_b.pop(mine)]

    def outputs(self) -> Iterator[tuple[int, Source, Source]]:
        """Give the outputs that both graphs have: the position in the first, and where each comes from."""
        theirs = dict(zip(self.b.outputs, self.b.view.outputs, strict=True))
        for place, source in zip(self.a.outputs, self.a.view.outputs, strict=True):
            if place in theirs:
                yield place, source, theirs[place]

    def swapped(self) -> Matching:
        """Return the same from the other side."""
        return Matching(self.b, self.a, self.to_a, self.to_b, self.names_kept, self.names_proven)


def matching(a: Side, b: Side) -> Matching:
    """Return the pairs of nodes of two graphs."""
    found = Matching(a, b)
    palette = Palette()
    sides = (a, b)
    for side in sides:
        side.computed = computed(side, palette, exact=True)
    uses = [used(side, palette, exact=True) for side in sides]
    both = [list(zip(side.computed, use, strict=True)) for side, use in zip(sides, uses, strict=True)]
    _pair_classes(found, both[0], both[1], every=True)
    _pair_classes(found, uses[0], uses[1])
    _pair_classes(found, a.computed, b.computed)
    loose = [computed(side, palette, exact=False) for side in sides]
    uses = [used(side, palette, exact=False) for side in sides]
    both = [list(zip(mine, use, strict=True)) for mine, use in zip(loose, uses, strict=True)]
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


def of_same_weights(found: Matching) -> tuple[dict[int, int], dict[int, int]]:
    """Return a number for each unmatched node of each graph that takes weights which one of the other takes too.

    Those of one number stand for each other. A weight has more than one element, and one unmatched node in each graph.
    """
    takers: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for letter, side, matched in (("a", found.a, found.to_b), ("b", found.b, found.to_a)):
        for place, given in enumerate(side.view.inputs):
            if place in matched:
                continue
            for source in given:
                if source.kind == "constant" and side.view.constants[int(source.of)].size > 1:
                    takers[side.view.constants[int(source.of)].digest].append((letter, place))
    graph = networkx.Graph(tuple(pair) for pair in takers.values() if sorted(each[0] for each in pair) == ["a", "b"])
    groups: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for number, component in enumerate(networkx.connected_components(graph)):
        for letter, place in component:
            groups[letter == "b"][place] = number
    return groups


def _pair_beside_weights(found: Matching) -> None:
    """Case 7."""
    mine, theirs = (_members(group) for group in of_same_weights(found))
    for strict in (True, False):
        for number in mine:
            for beside in (_takers, _givers):
                _pair_consumers(
                    found,
                    beside(found.a.view, mine[number]),
                    beside(found.b.view, theirs[number]),
                    [],
                    strict=strict,
                )


def _members(groups: Mapping[int, int]) -> dict[int, set[int]]:
    members: dict[int, set[int]] = defaultdict(set)
    for place, number in groups.items():
        members[number].add(place)
    return members


def _takers(view: GraphView, inside: set[int]) -> list[Consumer]:
    return [each for place in inside for each in view.consumers[place] if each.node not in inside]


def _givers(view: GraphView, inside: set[int]) -> list[Consumer]:
    """Return the nodes that feed some others, each once; which input they feed says nothing here."""
    makers = {int(source.of) for place in inside for source in view.inputs[place] if source.kind == "node"}
    return [Consumer(place, 0, 0) for place in sorted(makers - inside)]


def _prefer_names(found: Matching) -> None:
    """Case 8: pair a node with the one of its name instead, where that has no counterpart and computes the same."""
    if not found.names_kept:
        return
    free = {_first_output(node): place for place, node in enumerate(found.a.view.nodes) if place not in found.to_b}
    for one, other in list(found.to_b.items()):
        name = _first_output(found.b.view.nodes[other])
        namesake = free.get(name)
        if namesake is None or name == _first_output(found.a.view.nodes[one]):
            continue
        if found.a.computed[namesake] == found.b.computed[other]:
            found.part(one)
            found.pair(namesake, other)


def _pair_classes(found: Matching, mine: Sequence[_Key], theirs: Sequence[_Key], *, every: bool = False) -> None:
    """Pair nodes that are the only ones of their colour; with ``every``, as many of one colour too, in their order."""
    left, right = _classes(mine, found.to_b), _classes(theirs, found.to_a)
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
    """Return whether to believe names, which without a sign is so, and whether there is a sign."""
    a, b = found.a.view, found.b.view
    theirs = {_first_output(node) for node in b.nodes}
    kept = [
        name == _first_output(b.nodes[other])
        for one, other in found.to_b.items()
        if (name := _first_output(a.nodes[one])) in theirs and all(each.node >= 0 for each in a.consumers[one])
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
        outputs = [(mine, theirs) for _, mine, theirs in found.outputs()]
        _pair_producers(found, outputs, queue, strict=strict)
        _pair_consumers(found, _of_inputs(found.a), _of_inputs(found.b), queue, strict=strict)
        for one, other in queue:
            _pair_producers(
                found, zip(found.a.view.inputs[one], found.b.view.inputs[other], strict=False), queue, strict=strict
            )
            _pair_consumers(found, found.a.view.consumers[one], found.b.view.consumers[other], queue, strict=strict)


def _of_inputs(side: Side) -> list[Consumer]:
    """Return who takes the graph's inputs, each with the input's position for an output."""
    return [
        Consumer(place, slot, side.inputs[int(source.of)])
        for place, given in enumerate(side.view.inputs)
        for slot, source in enumerate(given)
        if source.kind == "input"
    ]


def _pair_producers(
    found: Matching, sources: Iterable[tuple[Source, Source]], queue: list[tuple[int, int]], *, strict: bool
) -> None:
    for mine, theirs in sources:
        if (mine.kind, theirs.kind) == ("node", "node") and mine.slot == theirs.slot:
            one, other = int(mine.of), int(theirs.of)
            if one in found.to_b or other in found.to_a:
                continue
            if _trait(found.a, one, strict=strict) == _trait(found.b, other, strict=strict):
                found.pair(one, other)
                queue.append((one, other))


def _pair_consumers(
    found: Matching,
    mine: Iterable[Consumer],
    theirs: Iterable[Consumer],
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
        for side, consumers, matched in ((found.a, mine, found.to_b), (found.b, theirs, found.to_a))
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
