"""A drawing of plain shapes in pixels, y downward, each with the role that decides its colour.

No figure is wider than a phone, so that none is scaled down: 328 pixels, except for graphs, which scroll.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from gradctl.core.numbers import Number

WIDTH = 328.0
CHARACTER = 6.1  # the mean width of one at the size of small text, 11 pixels

Plain = Literal["ink", "muted", "grid", "box", "blank", "accent"]
Judging = Literal["good", "bad", "warn", "good-soft", "bad-soft", "warn-soft"]
Heat = Literal["heat0", "heat1", "heat2", "heat3", "heat4", "heat5", "heat6"]
Role = Plain | Judging | Heat
Anchor = Literal["start", "middle", "end"]
HEATS: tuple[Heat, ...] = get_args(Heat)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A filled rectangle; ``edge`` is the role of its border, ``radius`` of its corners."""

    x: float
    y: float
    width: float
    height: float
    fill: Role
    edge: Role | None = None
    radius: float = 0.0
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    role: Role
    width: float = 1.0
    is_dashed: bool = False
    has_arrow: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    role: Role


@dataclass(frozen=True, slots=True)
class Text:
    """One line of text; ``y`` is its base line."""

    x: float
    y: float
    text: str
    role: Role = "muted"
    anchor: Anchor = "start"
    is_bold: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """Shapes that are one thing to point at: ``details`` describes it, ``twin`` is the key of its match."""

    shapes: tuple[Shape, ...]
    details: str
    key: str = ""
    twin: str = ""


Shape = Rectangle | Line | Dot | Text | Node


@dataclass(slots=True)
class Drawing:
    """A figure.

    Attributes:
        title: what it shows, in one sentence, for those who do not see it.
        width, height: in pixels.
        shapes: in the order in which they are drawn.
    """

    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Draw shapes over those that are there."""
        self.shapes.extend(shapes)


def finite(value: Number) -> float | None:
    """Return a number of a report if it is finite."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def fitted(text: str, width: float) -> str:
    """Return a text that is at most so many pixels wide, with an ellipsis if it is cut."""
    most = max(2, int(width / CHARACTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"


@dataclass(frozen=True, slots=True)
class Decades:
    """A logarithmic axis: the exponents at its ends, and the pixels at which they are."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def around(cls, values: Iterable[Number], start: float, end: float, *, least: int = 3) -> Decades:
        """Return an axis over all values that are positive and finite, of at least so many decades."""
        found = [math.log10(number) for value in values if (number := finite(value)) is not None and number > 0]
        low, high = math.floor(min(found, default=-8)), math.ceil(max(found, default=0))
        return cls(min(low, high - least), high, start, end)

    def place(self, value: float) -> float:
        """Return the pixel of a value; one beyond an end, or 0, is at that end."""
        return self.at(math.log10(value) if value > 0 else self.low)

    def at(self, exponent: float) -> float:
        """Return the pixel of a power of ten."""
        part = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> list[int]:
        """Return at most so many exponents, evenly spaced from the upper end."""
        every = -(-(self.high - self.low) // (most - 1)) or 1
        return list(range(self.high, self.low - 1, -every))


def power(exponent: int) -> str:
    """Return ``1e-5``."""
    return f"1e{exponent}" if exponent else "1"
