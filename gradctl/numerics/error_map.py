"""Where a tensor is off: the errors of its elements as a small matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradctl.core.findings import ErrorMap
from gradctl.core.numbers import number

# The most cells of a map: what a screen shows, and 3 kB in a report.
_MOST_ROWS, _MOST_COLUMNS = 16, 24


def error_map(errors: Tensor) -> ErrorMap | None:
    """Return the absolute errors of a tensor of any shape in at most 16 by 24 cells; None if it has no elements.

    A cell is the largest error in its block of elements; NaN if the block has one.
    """
    if not errors.numel():
        return None
    matrix = errors.detach().to("cpu", torch.float64)
    matrix = matrix.reshape(matrix.shape[0], -1) if matrix.dim() > 1 else matrix.reshape(1, -1)
    height, width = (-(-size // most) for size, most in zip(matrix.shape, (_MOST_ROWS, _MOST_COLUMNS), strict=True))
    cells = torch.nn.functional.max_pool2d(matrix[None], (height, width), ceil_mode=True)[0]
    rows, columns = cells.shape
    values = tuple(number(float(f"{value:.3g}")) for value in cells.reshape(-1).tolist())
    return ErrorMap(rows=rows, columns=columns, block_rows=height, block_columns=width, values=values)
