"""Numbers as a report stores and prints them."""

from __future__ import annotations

import math
from typing import Literal

# JSON has no NaN and no infinity; ``null`` means "none" (no gradient, not measured), which is not zero.
Number = float | Literal["nan", "inf", "-inf"] | None


def number(value: float | None) -> Number:
    """Return ``value`` as the report stores it: NaN and infinities by name."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def format_number(value: Number) -> str:
    """Return ``value`` as the reports print it: three significant digits, ``-`` for none, ``0`` for zero."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return "0" if value == 0 else f"{value:.2e}"
