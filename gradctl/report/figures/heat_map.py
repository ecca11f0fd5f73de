"""Where a tensor is off: the errors of its elements as a heat map, or only the elements that were measured."""

from __future__ import annotations

import math

from gradctl.core.findings import ErrorMap, TensorResult
from gradctl.core.numbers import Number, format_number
from gradctl.report.figures.drawing import HEATS, WIDTH, Drawing, Rectangle, Role, Text, finite

_MOST_ROWS, _MOST_COLUMNS = 16, 24
_LARGEST_CELL = 22.0
_TOP = 18.0
# Errors below this part of the largest have the lightest colour.
_RANGE = 1e-4
_LEGEND = len(HEATS) * 14.0 + 6


def heat_map(tensor: TensorResult) -> Drawing | None:
    """Return the heat map of a tensor's errors; None if no element is known."""
    errors = tensor.errors if tensor.errors is not None else _measured(tensor)
    if errors is None or not (0 < errors.rows <= _MOST_ROWS and 0 < errors.columns <= _MOST_COLUMNS):
        return None
    if len(errors.values) != errors.rows * errors.columns:
        return None
    cell = min(_LARGEST_CELL, WIDTH / errors.columns)
    height = max(cell * 0.6, min(cell, 14.0)) if errors.rows > 8 else cell
    largest = max((known for each in errors.values if (known := finite(each)) is not None), default=0.0)
    drawing = Drawing(f"absolute errors of {tensor.tensor}: at most {format_number(largest)}", WIDTH, 0.0)
    drawing.add(Text(0, 11, f"{_axes(tensor, errors)}, largest error {format_number(largest)}", "muted"))
    for number, value in enumerate(errors.values):
        row, column = divmod(number, errors.columns)
        role = _heat(value, largest)
        drawing.add(Rectangle(column * cell, _TOP + row * height, cell - 1, height - 1, role))
    y = _TOP + errors.rows * height + 6
    for number, role in enumerate(HEATS):
        drawing.add(Rectangle(number * 14.0, y, 13, 8, role))
    drawing.add(Text(_LEGEND, y + 8, _legend(errors, largest), "muted"))
    drawing.height = y + 12
    return drawing


def _legend(errors: ErrorMap, largest: float) -> str:
    ends = f"0 to {format_number(largest)}"
    return f"{ends}; hollow: not measured" if None in errors.values else ends


def _heat(value: Number, largest: float) -> Role:
    if value is None:
        return "blank"
    number = finite(value)
    if number is None:
        return HEATS[-1]
    if number <= 0 or largest <= 0:
        return HEATS[0]
    part = 1 - math.log10(max(number / largest, _RANGE)) / math.log10(_RANGE)
    return HEATS[round(part * (len(HEATS) - 1))]


def _axes(tensor: TensorResult, errors: ErrorMap) -> str:
    shape = list(tensor.shape)
    matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    size = errors.block_rows, errors.block_columns
    block = "" if size == (1, 1) else f" in blocks of {size[0]} x {size[1]}"
    return f"{matrix[0]} x {matrix[1]} elements{block}"


def _measured(tensor: TensorResult) -> ErrorMap | None:
    """Return a map of the elements that were measured alone."""
    shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    sizes = shape[0], math.prod(shape[1:])
    if not tensor.worst or min(sizes) < 1:
        return None
    height, width = (-(-size // most) for size, most in zip(sizes, (_MOST_ROWS, _MOST_COLUMNS), strict=True))
    rows, columns = -(-sizes[0] // height), -(-sizes[1] // width)
    cells: list[Number] = [None] * (rows * columns)
    for each in tensor.worst:
        if len(each.index) != len(tensor.shape):
            return None
        flat = 0
        for place, size in zip(each.index, tensor.shape, strict=True):
            flat = flat * size + place
        row, column = divmod(flat, sizes[1])
        if not (0 <= row < sizes[0]):
            return None
        cells[row // height * columns + column // width] = each.absolute_error
    return ErrorMap(rows=rows, columns=columns, block_rows=height, block_columns=width, values=tuple(cells))
