"""The part of two graphs that differs, side by side: matched nodes in one row, changed ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gradctl.core.structure import DrawnNode, GraphPart
from gradctl.report.figures.drawing import CHARACTER, WIDTH, Drawing, Line, Node, Rectangle, Role, Text, fitted
from gradctl.report.figures.graph_layout import edges_of, lay_out, pairs_of

# Two graphs of one column each are as wide as a phone.
_BOX, _HEIGHT, _GAP, _GUTTER = 140.0, 24.0, 10.0, 24.0
_STEP = 46.0  # from a row to the next
_TOP, _MARGIN = 26.0, 12.0

_Side = Literal["before", "after"]
# What stands before the operator of a changed node, so that colour alone says nothing.
_MARKS: dict[_Side, str] = {"before": "− ", "after": "+ "}


def graph_picture(part: GraphPart, key: str) -> Drawing:
    """Return the drawing of one part; ``key`` makes those of its nodes unique in a page."""
    layout = lay_out(part)
    width = layout.columns * (_BOX + _GAP) - _GAP
    drawing = Drawing(_title(part), max(WIDTH, 2 * width + _GUTTER + 2 * _MARGIN), layout.rows * _STEP + _TOP)
    pairs = pairs_of(part)
    twins = {"before": pairs, "after": {other: one for one, other in pairs.items()}}
    sides: list[tuple[_Side, Sequence[DrawnNode], list[tuple[int, int]], float]] = [
        ("before", part.before, layout.before, _MARGIN),
        ("after", part.after, layout.after, _MARGIN + width + _GUTTER),
    ]
    if layout.columns == 1:
        for one in pairs:
            y = _TOP + layout.before[one][0] * _STEP + _HEIGHT / 2
            drawing.add(Line(((_MARGIN + width, y), (_MARGIN + width + _GUTTER, y)), "grid", is_dashed=True))
    for side, nodes, places, left in sides:
        drawing.add(Text(left, 14, side, "muted", is_bold=True))
        corners = [(left + column * (_BOX + _GAP), _TOP + row * _STEP) for row, column in places]
        drawing.add(*(_edge(corners[one], corners[other]) for one, other in edges_of(nodes)))
        other_side = "after" if side == "before" else "before"
        for place, node in enumerate(nodes):
            twin = twins[side].get(place)
            drawing.add(
                Node(
                    _box(node, side, *corners[place]),
                    _details(node, side, twin is not None),
                    f"{key}-{side}-{place}",
                    f"{key}-{other_side}-{twin}" if twin is not None else "",
                )
            )
    return drawing


def _title(part: GraphPart) -> str:
    changed = [sum(node.change is not None for node in side) for side in (part.before, part.after)]
    return f"the graphs before and after: {changed[0]} nodes are changed to {changed[1]}"


def _edge(one: tuple[float, float], other: tuple[float, float]) -> Line:
    start, end = (one[0] + _BOX / 2, one[1] + _HEIGHT), (other[0] + _BOX / 2, other[1])
    middle = end[1] - (_STEP - _HEIGHT) / 2
    if start[0] == end[0]:
        return Line((start, end), "muted", has_arrow=True)
    return Line((start, (start[0], middle), (end[0], middle), end), "muted", has_arrow=True)


def _box(node: DrawnNode, side: _Side, x: float, y: float) -> tuple[Rectangle, Text]:
    is_pair = node.change is not None and node.counterpart is not None
    fill: Role = "box"
    edge: Role = "muted"
    mark = ""
    if is_pair:
        fill, edge, mark = "warn-soft", "warn", "~ "
    elif node.change is not None:
        fill, edge = ("bad-soft", "bad") if side == "before" else ("good-soft", "good")
        mark = _MARKS[side]
    text = fitted(mark + node.operator.rpartition("::")[2], _BOX - 2 * CHARACTER)
    box = Rectangle(x, y, _BOX, _HEIGHT, fill, edge, 4, is_dashed=node.change is not None)
    return box, Text(x + _BOX / 2, y + 16, text, "ink", "middle", is_bold=node.change is not None)


def _details(node: DrawnNode, side: _Side, is_matched: bool) -> str:
    state = node.change or ("unchanged" if is_matched else "not matched")
    name = f" {node.name}" if node.name else ""
    lines = [f"{side}: {node.operator}{name} ({state})"]
    lines += [f"{name} = {value}" for name, value in sorted(node.attributes.items())]
    if node.inputs:
        lines.append(f"inputs: {', '.join(each or '-' for each in node.inputs)}")
    return "; ".join([*lines, f"output: {node.value}"] if node.value else lines)
