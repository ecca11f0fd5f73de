"""The error of each tensor on a log scale, beside its tolerance."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl.core.findings import TensorResult
from gradctl.core.numbers import Number, format_number
from gradctl.report.figures.drawing import (
    WIDTH,
    Anchor,
    Decades,
    Dot,
    Drawing,
    Line,
    Rectangle,
    Shape,
    Text,
    finite,
    fitted,
    power,
)

_STRIP_WIDTH, _STRIP_HEIGHT = 168.0, 18.0
_MARGIN = 6.0
# Of a chart: the name above its strip.
_ROW = 34.0
_MOST_TICKS = 4


def error_scale(tensors: Sequence[TensorResult], width: float = _STRIP_WIDTH) -> Decades:
    """Return the axis of all errors and tolerances of some tensors."""
    # What is not finite is drawn at the end, beyond all others.
    values: list[Number] = [10.0 if isinstance(tensor.error, str) else tensor.error for tensor in tensors]
    values += [tensor.budget for tensor in tensors]
    return Decades.around(values, _MARGIN, width - _MARGIN)


def error_strip(tensor: TensorResult, scale: Decades) -> Drawing:
    """Return the error of one tensor as a dot, on a band that ends at its tolerance."""
    said = f"relative error {format_number(tensor.error)}, tolerance {format_number(tensor.budget)}"
    drawing = Drawing(said, scale.end + _MARGIN, _STRIP_HEIGHT)
    drawing.add(*_strip(tensor, scale, 0.0))
    return drawing


def error_axis(scale: Decades) -> Drawing:
    """Return the axis above strips."""
    drawing = Drawing("relative error, on a logarithmic scale", scale.end + _MARGIN, 14.0)
    drawing.add(*_labels(scale, 11.0))
    return drawing


def error_chart(title: str, tensors: Sequence[TensorResult]) -> Drawing:
    """Return the strips of some tensors one below the other, each below its name."""
    scale = error_scale(tensors, WIDTH)
    drawing = Drawing(title, WIDTH, _ROW * len(tensors) + 22.0)
    drawing.add(*_labels(scale, 12.0))
    for row, tensor in enumerate(tensors):
        y = 20.0 + row * _ROW
        drawing.add(Text(_MARGIN, y + 10, fitted(tensor.tensor, WIDTH - 90), "ink"))
        drawing.add(Text(WIDTH - _MARGIN, y + 10, format_number(tensor.error), "muted", "end"))
        drawing.add(*_strip(tensor, scale, y + 13))
    return drawing


def _labels(scale: Decades, y: float) -> list[Shape]:
    ticks = scale.ticks(_MOST_TICKS)
    anchors: dict[int, Anchor] = {ticks[0]: "end", ticks[-1]: "start" if ticks[-1] == scale.low else "middle"}
    return [Text(scale.at(each), y, power(each), "muted", anchors.get(each, "middle")) for each in ticks]


def _strip(tensor: TensorResult, scale: Decades, top: float) -> list[Shape]:
    middle, bottom = top + _STRIP_HEIGHT / 2, top + _STRIP_HEIGHT - 2
    shapes: list[Shape] = []
    budget, error = finite(tensor.budget), finite(tensor.error)
    if budget:
        shapes.append(Rectangle(scale.start, middle - 4, scale.place(budget) - scale.start, 8, "good-soft"))
    shapes += [Line(((scale.at(each), top + 2), (scale.at(each), bottom)), "grid") for each in scale.ticks(_MOST_TICKS)]
    shapes.append(Line(((scale.start, middle), (scale.end, middle)), "grid"))
    if budget:
        shapes.append(Line(((scale.place(budget), top + 2), (scale.place(budget), bottom)), "ink", 1.5))
    if isinstance(tensor.error, str):  # nan or infinite: beyond the end
        shapes.append(Line(((scale.end - 8, middle), (scale.end, middle)), "bad", 3, has_arrow=True))
    elif error is not None:
        shapes.append(Dot(scale.place(error), middle, 4, "bad" if error > (budget or 0) else "good"))
    return shapes
