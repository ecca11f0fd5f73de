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

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx
import onnx

from gradctl.graphdiff.graph_view import Consumer, GraphView, Source, operator_of
from gradctl.graphdiff.node_colours import Palette, Side, colour_computations, colour_uses

_Key = Hashable


@dataclass(slots=True, eq=False)
class Matching:
    """Two graphs, whose nodes are matched.

    Attributes:
        a, b: the graphs.
        names_kept: whether names are used.
        names_proven: whether a pair that was found without names confirms them.
    """

    a: Side
    b: Side
    names_kept: bool = True
    names_proven: bool = False

    @property
    def to_b(self) -> dict[int, int]:
        """The positions of nodes of ``b`` by those of ``a``."""
        return self.a.counterparts

    def pair(self, reference: int, candidate: int) -> None:
        """Match two nodes."""
        self.a.counterparts[reference], self.b.counterparts[candidate] = candidate, reference

    def unpair(self, reference: int) -> None:
        """Remove a pair."""
        del self.b.counterparts[self.a.counterparts.pop(reference)]

    def inputs(self, one: int) -> Iterator[tuple[Source, Source]]:
        """Return the sources of the inputs that a matched node of ``a`` and its counterpart both have."""
        return zip(self.a.view.inputs[one], self.b.view.inputs[self.to_b[one]], strict=False)

    def outputs(self) -> Iterator[tuple[int, Source, Source]]:
        """Yield the outputs that both graphs have: the position in the first, and both sources."""
        candidate = dict(zip(self.b.outputs, self.b.view.outputs, strict=True))
        for place, source in zip(self.a.outputs, self.a.view.outputs, strict=True):
            if place in candidate:
                yield place, source, candidate[place]

    def are_unmatched(self, reference: Source, candidate: Source) -> bool:
        """Return whether two sources are nodes without a counterpart."""
        return self.a.is_unmatched(reference) and self.b.is_unmatched(candidate)

    def swapped(self) -> Matching:
        """Return the matching with the graphs exchanged."""
        return Matching(self.b, self.a, self.names_kept, self.names_proven)


def match_nodes(a: Side, b: Side) -> Matching:
    """Return the pairs of nodes of two graphs."""
    found = Matching(a, b)
    palette = Palette()
    for side in (a, b):
        side.computed = colour_computations(side, palette, exact=True)
    uses = [colour_uses(side, palette, exact=True) for side in (a, b)]
    _pair_classes(found, *_zipped((a.computed, b.computed), uses), every=True)
    _pair_classes(found, *uses)
    _pair_classes(found, a.computed, b.computed)
    loose = [colour_computations(side, palette, exact=False) for side in (a, b)]
    uses = [colour_uses(side, palette, exact=False) for side in (a, b)]
    _pair_classes(found, *_zipped(loose, uses))
    found.names_kept, found.names_proven = _names_kept(found)
    _pair_names(found)
    _pair_neighbours(found)
    for colours in (uses, loose):
        _pair_classes(found, *colours)
        _pair_neighbours(found)
    count = -1
    while count < len(found.to_b):
        count = len(found.to_b)
        _pair_beside_weights(found)
        _pair_neighbours(found)
    for each in (found, found.swapped()):
        _prefer_names(each)
    return found


def _zipped(computed: Sequence[Sequence[int]], uses: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Return both colours of each node of each graph."""
    return [list(zip(*colours, strict=True)) for colours in zip(computed, uses, strict=True)]


def group_by_weights(found: Matching) -> list[set[tuple[Side, int]]]:
    """Return groups of unmatched nodes of both graphs that correspond because they use the same weights.

    A weight has more than one element, and one unmatched user in each graph.
    """
    a, b = _users_of_weights(found.a), _users_of_weights(found.b)
    shared = [weight for weight in a if len(a[weight]) == len(b.get(weight, ())) == 1]
    graph = networkx.Graph(((found.a, a[weight][0]), (found.b, b[weight][0])) for weight in shared)
    return list(networkx.connected_components(graph))


def _users_of_weights(side: Side) -> dict[bytes, list[int]]:
    """Return the unmatched nodes that use each constant of more than one element, once for each input."""
    weights = {each.digest for each in side.view.constants if each.size > 1}
    users: dict[bytes, list[int]] = defaultdict(list)
    for place in side.unmatched():
        for _, digest in side.constants(place):
            users[digest].append(place)
    return {digest: places for digest, places in users.items() if digest in weights}


def _pair_beside_weights(found: Matching) -> None:
    """Case 7."""
    groups = group_by_weights(found)
    for strict in (True, False):
        for group in groups:
            for neighbours in (_consumers, _producers):
                left, right = (
                    neighbours(side.view, {place for each, place in group if each is side})
                    for side in (found.a, found.b)
                )
                _pair_consumers(found, left, right, [], strict=strict)


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
    free = {_first_output(found.a.view.nodes[place]): place for place in found.a.unmatched()}
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
    left, right = _classes(found.a, reference), _classes(found.b, candidate)
    for colour, places in left.items():
        others = right.get(colour, [])
        if len(places) == len(others) and (every or len(places) == 1):
            for one, other in zip(places, others, strict=True):
                found.pair(one, other)


def _classes(side: Side, colours: Sequence[_Key]) -> dict[_Key, list[int]]:
    """Return the unmatched nodes by colour; a node without a colour belongs to no class."""
    classes: dict[_Key, list[int]] = defaultdict(list)
    for place in side.unmatched():
        classes[colours[place]].append(place)
    classes.pop(None, None)
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
        queue = list(found.to_b)
        outputs = [(reference, candidate) for _, reference, candidate in found.outputs()]
        _pair_producers(found, outputs, queue, strict=strict)
        _pair_consumers(found, _consumers_of_inputs(found.a), _consumers_of_inputs(found.b), queue, strict=strict)
        for one in queue:
            _pair_producers(found, found.inputs(one), queue, strict=strict)
            consumers = found.a.view.consumers[one], found.b.view.consumers[found.to_b[one]]
            _pair_consumers(found, *consumers, queue, strict=strict)


def _consumers_of_inputs(side: Side) -> list[Consumer]:
    """Return the consumers of the graph's inputs, each with the input's position as its output."""
    return [
        Consumer(place, slot, side.inputs[source.place])
        for place, given in enumerate(side.view.inputs)
        for slot, source in enumerate(given)
        if source.kind == "input"
    ]


def _pair_producers(
    found: Matching, sources: Iterable[tuple[Source, Source]], queue: list[int], *, strict: bool
) -> None:
    for reference, candidate in sources:
        if found.are_unmatched(reference, candidate) and reference.slot == candidate.slot:
            one, other = reference.place, candidate.place
            if _trait(found.a, one, strict=strict) == _trait(found.b, other, strict=strict):
                found.pair(one, other)
                queue.append(one)


def _pair_consumers(
    found: Matching, reference: Iterable[Consumer], candidate: Iterable[Consumer], queue: list[int], *, strict: bool
) -> None:
    """Pair the only unmatched consumers with the same trait of the same value at the same input."""
    left, right = _by_use(found.a, reference, strict=strict), _by_use(found.b, candidate, strict=strict)
    for use in left:
        if len(left[use]) == len(right.get(use, ())) == 1:
            (one,), (other,) = left[use], right[use]
            if one not in found.a.counterparts and other not in found.b.counterparts:
                found.pair(one, other)
                queue.append(one)


def _by_use(side: Side, consumers: Iterable[Consumer], *, strict: bool) -> dict[_Key, list[int]]:
    uses: dict[_Key, list[int]] = defaultdict(list)
    for each in consumers:
        if each.node >= 0 and each.node not in side.counterparts:
            uses[each.output, each.slot, _trait(side, each.node, strict=strict)].append(each.node)
    return uses


def _trait(side: Side, place: int, *, strict: bool) -> _Key:
    operator = operator_of(side.view.nodes[place])
    if not strict:
        return operator
    return operator, tuple(side.identities(place).items()), side.constants(place)
