"""The parts of two graphs that differ, for a drawing: changed nodes that are connected, and the nodes next to them.

Of parts that differ in the same way (the layers of a transformer), one is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

import msgspec
import networkx

from gradctl.core.structure import ChangeKind, DrawnNode, GraphPart
from gradctl.graphdiff.graph_changes import Changes, PlacedChange, graph_node
from gradctl.graphdiff.graph_view import GraphView
from gradctl.graphdiff.node_colours import Side

# What a person can look at, of each graph in one part, and of both in all parts.
_MOST_CHANGED = 40
_MOST_BESIDE = 20
_MOST_NODES = 400


def select_parts(parts: Sequence[GraphPart]) -> list[GraphPart]:
    """Return one part of each kind, with how many there are, the most frequent first; as many as can be looked at."""
    counts = Counter(map(_likeness, parts))
    first = {_likeness(part): part for part in reversed(parts)}
    selected: list[GraphPart] = []
    left = _MOST_NODES
    for likeness, count in counts.most_common():
        part = first[likeness]
        left -= len(part.before) + len(part.after)
        if left < 0 and selected:
            break
        selected.append(msgspec.structs.replace(part, alike=count))
    return selected


def changed_parts(changes: Changes) -> Iterator[GraphPart]:
    """Yield the parts of two graphs that differ, in the order of the first."""
    placed = [change for change in changes.placed if change.before or change.after]
    for group in _connected(changes, placed):
        yield _part(changes, [placed[number] for number in group])


def _likeness(part: GraphPart) -> Hashable:
    sides = [
        tuple(sorted((node.operator, node.change or "") for node in side if node.change))
        for side in (part.before, part.after)
    ]
    return tuple(sides), part.omitted


def _connected(changes: Changes, placed: Sequence[PlacedChange]) -> list[list[int]]:
    """Return the numbers of the changes in groups: those of which a node uses a value of another's."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(placed)))
    for side, places in ((changes.a, [each.before for each in placed]), (changes.b, [each.after for each in placed])):
        owner = {place: number for number, own in enumerate(places) for place in own}
        for place, number in owner.items():
            graph.add_edges_from((number, owner[each]) for each in _producers(side.view, place) if each in owner)
    return sorted(sorted(component) for component in networkx.connected_components(graph))


def _part(changes: Changes, group: Sequence[PlacedChange]) -> GraphPart:
    kinds: tuple[dict[int, ChangeKind], dict[int, ChangeKind]] = ({}, {})
    for change in group:
        kinds[0].update(dict.fromkeys(change.before, change.kind))
        kinds[1].update(dict.fromkeys(change.after, change.kind))
    changed = [sorted(own)[:_MOST_CHANGED] for own in kinds]
    sides = zip((changes.a, changes.b), changed, kinds, strict=True)
    beside = [_beside(side, own, kind) for side, own, kind in sides]
    # A node that is beside the changed ones in one graph is drawn in both, to be aligned.
    to_a, to_b = changes.b.counterparts, changes.a.counterparts
    shown = (
        _ordered(changed[0], beside[0], (to_a[each] for each in (*changed[1], *beside[1]) if each in to_a)),
        _ordered(changed[1], beside[1], (to_b[each] for each in (*changed[0], *beside[0]) if each in to_b)),
    )
    numbers = [{place: position for position, place in enumerate(side)} for side in shown]
    return GraphPart(
        before=tuple(_drawn(changes.a, place, kinds[0], numbers) for place in shown[0]),
        after=tuple(_drawn(changes.b, place, kinds[1], numbers[::-1]) for place in shown[1]),
        omitted=sum(len(own) - len(some) for own, some in zip(kinds, changed, strict=True)),
    )


def _ordered(changed: Sequence[int], beside: Sequence[int], counterparts: Iterator[int]) -> list[int]:
    return sorted({*changed, *beside, *counterparts})


def _beside(side: Side, places: Sequence[int], changed: Collection[int]) -> list[int]:
    """Return the nodes that did not change, and compute values for these nodes, or use theirs."""
    found: dict[int, None] = {}
    for place in places:
        found |= dict.fromkeys(_producers(side.view, place))
        found |= dict.fromkeys(each.node for each in side.view.consumers[place] if each.node >= 0)
    return [place for place in found if place not in changed][:_MOST_BESIDE]


def _producers(view: GraphView, place: int) -> list[int]:
    return [each.place for each in (*view.inputs[place], *view.captured[place]) if each.kind == "node"]


def _drawn(side: Side, place: int, kinds: Mapping[int, ChangeKind], numbers: Sequence[Mapping[int, int]]) -> DrawnNode:
    """Return a node; ``numbers`` are the positions of the drawn nodes of its graph, and of those of the other."""
    node, sources = graph_node(side.view, place), side.view.inputs[place]
    own, other = numbers
    return DrawnNode(
        operator=node.operator,
        name=node.name,
        value=node.value,
        attributes={name: text for name, (text, _) in side.attributes[place].items()},
        inputs=tuple(map(side.view.name_of, sources)),
        sources=tuple(own.get(each.place) if each.kind == "node" else None for each in sources),
        counterpart=other.get(side.counterparts.get(place, -1)),
        change=kinds.get(place),
    )
