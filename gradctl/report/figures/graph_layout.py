"""Where the nodes of two graphs stand, so that matched nodes are in one row and column.

Both graphs are laid out as one, in which matched nodes are one node: by layers (the longest path from a source), and
within a layer by the median of what a node uses.

Source: Sugiyama, Tagawa and Toda, IEEE Trans. Syst. Man Cybern. 11 (1981) 109.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradctl.core.structure import DrawnNode, GraphPart

_SWEEPS = 4


@dataclass(frozen=True, slots=True)
class GraphLayout:
    """The row and column of each node of both graphs, by its position in the part, and how many there are."""

    before: list[tuple[int, int]]
    after: list[tuple[int, int]]
    rows: int
    columns: int


def edges_of(nodes: Sequence[DrawnNode]) -> list[tuple[int, int]]:
    """Return the edges between drawn nodes: producer, consumer; those of a stored report that make no sense not."""
    found = (
        (source, place)
        for place, node in enumerate(nodes)
        for source in node.sources
        if source is not None and 0 <= source < len(nodes) and source != place
    )
    return list(dict.fromkeys(found))


def pairs_of(part: GraphPart) -> dict[int, int]:
    """Return the positions of matched nodes, of which each knows the other."""
    return {
        one: other
        for one, node in enumerate(part.before)
        if (other := node.counterpart) is not None
        and 0 <= other < len(part.after)
        and part.after[other].counterpart == one
    }


def lay_out(part: GraphPart) -> GraphLayout:
    """Return the rows and columns of the nodes of both graphs."""
    pairs = pairs_of(part)
    of_after = {other: one for one, other in pairs.items()}
    count = len(part.before)
    merged = [of_after.get(place, count + place) for place in range(len(part.after))]
    names = [*range(count), *(each for each in merged if each >= count)]
    edges = [*edges_of(part.before), *((merged[one], merged[other]) for one, other in edges_of(part.after))]
    users: dict[int, list[int]] = {name: [] for name in names}
    for one, other in dict.fromkeys(edges):
        users[one].append(other)
    rows = _layers(names, users)
    # Of a node that one graph has alone, the place in the other graph is free.
    sides = {name: (0, 1) if name in pairs else (0,) if name < count else (1,) for name in names}
    columns = _columns(sides, users, rows)
    places = {name: (rows[name], columns[name]) for name in names}
    width = max((column for _, column in places.values()), default=-1) + 1
    height = max((row for row, _ in places.values()), default=-1) + 1
    return GraphLayout([places[each] for each in range(count)], [places[each] for each in merged], height, width)


def _layers(names: Sequence[int], users: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Return the longest path to each node; edges that would close a cycle of the merged graph do not count."""
    order = _topological(names, users)
    rank = {name: place for place, name in enumerate(order)}
    layers = dict.fromkeys(names, 0)
    for name in order:
        for user in users[name]:
            if rank[user] > rank[name]:
                layers[user] = max(layers[user], layers[name] + 1)
    # A source stands right above its first user, not at the top of the drawing.
    used = {user for name in names for user in users[name]}
    for name in names:
        below = [layers[user] for user in users[name] if rank[user] > rank[name]]
        if name not in used and below:
            layers[name] = min(below) - 1
    return layers


def _topological(names: Sequence[int], users: Mapping[int, Sequence[int]]) -> list[int]:
    """Return the nodes so that each stands before its users, except in cycles: depth first, without recursion."""
    done: set[int] = set()
    entered: set[int] = set()
    order: list[int] = []
    for start in reversed(names):
        stack = [(start, False)]
        while stack:
            name, is_left = stack.pop()
            if is_left:
                done.add(name)
                order.append(name)
            elif name not in entered:
                entered.add(name)
                stack.append((name, True))
                stack += [(user, False) for user in users[name] if user not in entered]
    return order[::-1]


def _columns(
    sides: Mapping[int, Sequence[int]], users: Mapping[int, Sequence[int]], rows: Mapping[int, int]
) -> dict[int, int]:
    """Return the columns: in each row by the median column of the neighbours above, then below, and so on."""
    above: dict[int, list[int]] = {name: [] for name in sides}
    for name in sides:
        for user in users[name]:
            above[user].append(name)
    layers: dict[int, list[int]] = {}
    for name in sides:
        layers.setdefault(rows[name], []).append(name)
    columns: dict[int, int] = {}
    for layer in layers.values():
        _place(layer, dict.fromkeys(layer, 0), sides, columns)
    last = max(columns.values(), default=0)
    for sweep in range(_SWEEPS):
        neighbours: Mapping[int, Sequence[int]] = users if sweep % 2 else above
        for row in sorted(layers, reverse=bool(sweep % 2)):
            medians = {
                name: statistics.median_low([columns[each] for each in neighbours[name]] or [columns[name]])
                for name in layers[row]
            }
            order = sorted(medians, key=lambda name: (medians[name], columns[name]))  # called here
            # Not so far to the right that the drawing would be wider than its widest row.
            room = max(0, last + 1 - len(order))
            wanted = {name: min(medians[name], room + place) for place, name in enumerate(order)}
            _place(order, wanted, sides, columns)
    return columns


def _place(
    layer: Sequence[int], wanted: Mapping[int, int], sides: Mapping[int, Sequence[int]], columns: dict[int, int]
) -> None:
    """Set the columns of a row, each as near to the one that is wanted as those before it in its graphs allow."""
    free = [0, 0]
    for name in layer:
        columns[name] = max(wanted[name], *(free[side] for side in sides[name]))
        for side in sides[name]:
            free[side] = columns[name] + 1
