"""A drawing as SVG inside a page, whose style sheet has a colour for each role."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from markupsafe import Markup, escape

from gradctl.report.figures.drawing import Dot, Drawing, Line, Node, Rectangle, Shape, Text
from gradctl.report.text.wording import printable


def svg(drawing: Drawing) -> Markup:
    """Return a drawing as an ``svg`` element; its nodes can be reached by the keyboard."""
    has_nodes = any(isinstance(shape, Node) for shape in drawing.shapes)
    size = f"{_number(drawing.width)} {_number(drawing.height)}".split()
    head = Markup('<svg width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="{2}" aria-label="{3}">').format(
        *size, "group" if has_nodes else "img", printable(drawing.title)
    )
    return head + Markup("").join(_shapes(drawing.shapes)) + Markup("</svg>")


def _shapes(shapes: Iterable[Shape]) -> Iterator[Markup]:
    """Yield the shapes; plain ones of one kind that follow each other are one path, which is a third of the text."""
    for style, some in itertools.groupby(shapes, key=_style):
        if style is None:
            yield from map(_shape, some)
        else:
            yield Markup('<path class="{}" d="{}"{}/>').format(style[0], "".join(map(_path, some)), Markup(style[1]))


def _style(shape: Shape) -> tuple[str, str] | None:
    """Return class and attributes of a shape that can be a part of a path; None for another."""
    if isinstance(shape, Rectangle) and shape.edge is None and not shape.radius:
        return f"f-{shape.fill}", ""
    if isinstance(shape, Line):
        attributes = "" if shape.width == 1 else f' stroke-width="{_number(shape.width)}"'
        attributes += ' stroke-dasharray="4 3"' if shape.is_dashed else ""
        return f"s-{shape.role}", attributes
    return None


def _path(shape: Shape) -> str:
    if isinstance(shape, Rectangle):
        width, height = _number(shape.width), _number(shape.height)
        return f"M{_number(shape.x)} {_number(shape.y)}h{width}v{height}h-{width}z"
    assert isinstance(shape, Line)
    (start, *rest) = (f"{_number(x)} {_number(y)}" for x, y in shape.points)
    path = f"M{start}" + "".join(f"L{point}" for point in rest)
    return path + (_arrow(shape) if shape.has_arrow else "")


def _arrow(line: Line) -> str:
    """Return the two strokes of the head of an arrow, which points along the last part of a line."""
    (before_x, before_y), (x, y) = line.points[-2:]
    along_x, along_y = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
    ends = ((x - 4 * along_x + side * along_y, y - 4 * along_y + side * along_x) for side in (3, -3))
    (left, right) = (f"{_number(end_x)} {_number(end_y)}" for end_x, end_y in ends)
    return f"M{left}L{_number(x)} {_number(y)}L{right}"


def _shape(shape: Shape) -> Markup:
    match shape:
        case Rectangle(x, y, width, height, fill, edge, radius):
            classes = f"f-{fill}" + (f" s-{edge}" if edge else "")
            dash = Markup(' stroke-dasharray="4 2"') if shape.is_dashed else ""
            form = '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}"{}/>'
            return Markup(form).format(classes, *map(_number, (x, y, width, height, radius)), dash)
        case Dot(x, y, radius, role):
            return Markup('<circle class="f-{}" cx="{}" cy="{}" r="{}"/>').format(role, *map(_number, (x, y, radius)))
        case Text(x, y, text, role, anchor, is_bold):
            more = f' text-anchor="{anchor}"' if anchor != "start" else ""
            more += ' font-weight="600"' if is_bold else ""
            start = Markup('<text class="f-{}" x="{}" y="{}"{}>').format(role, _number(x), _number(y), Markup(more))
            return start + escape(printable(text)) + Markup("</text>")
        case Node(shapes, details, key, twin):
            said = printable(details)
            start = Markup(
                '<g class="node" tabindex="0" role="img" id="{}" data-twin="{}" aria-label="{}"><title>{}</title>'
            ).format(key, twin, said, said)
            return start + Markup("").join(_shapes(shapes)) + Markup("</g>")
    raise TypeError(shape)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
