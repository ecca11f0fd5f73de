"""Times as bars: of each unit, of the calls of forms beside eager's, and of a graph after each pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradctl.core.findings import Unit
from gradctl.core.optimization import Latency, Optimization
from gradctl.report.figures.drawing import WIDTH, Drawing, Line, Rectangle, Role, Text, fitted
from gradctl.report.text.optimization import format_seconds

_ROW = 30.0
_MOST_BARS = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: seconds, and the range around them if it is known."""

    label: str
    seconds: float
    role: Role = "accent"
    spread: tuple[float, float] | None = None


def bar_chart(title: str, bars: Sequence[Bar]) -> Drawing | None:
    """Return bars below their labels; None without a bar. Of many, the longest are drawn."""
    shown = bars if len(bars) <= _MOST_BARS else sorted(bars, key=lambda bar: -bar.seconds)[:_MOST_BARS]
    longest = max((max(bar.seconds, bar.spread[1] if bar.spread else 0.0) for bar in shown), default=0.0)
    if not 0 < longest < float("inf"):
        return None
    more = len(bars) - len(shown)
    drawing = Drawing(title, WIDTH, _ROW * len(shown) + (16 if more else 0))
    for row, bar in enumerate(shown):
        y, unit = row * _ROW, (WIDTH - 2) / longest
        drawing.add(Text(0, y + 11, fitted(bar.label, WIDTH - 70), "ink"))
        drawing.add(Text(WIDTH, y + 11, format_seconds(bar.seconds), "muted", "end"))
        drawing.add(Rectangle(0, y + 15, max(1.0, max(bar.seconds, 0.0) * unit), 8, bar.role))
        if bar.spread is not None:
            low, high = (min(max(each, 0.0) * unit, WIDTH) for each in bar.spread)
            drawing.add(Line(((low, y + 19), (high, y + 19)), "ink", 1.5))
    if more:
        drawing.add(Text(0, drawing.height - 4, f"and {more} more, which took less", "muted"))
    return drawing


def unit_bars(units: Sequence[Unit]) -> Drawing | None:
    """Return how long each of several units took."""
    roles: dict[str, Role] = {"fail": "bad", "pass": "good", "inconclusive": "warn", "skipped": "grid"}
    several = len({unit.target for unit in units}) > 1
    bars = [
        Bar(f"{unit.target}, {unit.form}" if several else unit.form, unit.seconds, roles[unit.verdict])
        for unit in units
        if unit.seconds > 0
    ]
    return bar_chart("seconds that each unit took", bars) if len(bars) > 1 else None


def call_bars(units: Sequence[Unit]) -> Drawing | None:
    """Return the times of forms beside eager's, measured in the same process; None of several targets."""
    if len({unit.target for unit in units}) > 1:
        return None
    return bar_chart("time of one call, beside eager's", [bar for unit in units for bar in _of_calls(unit)])


def _of_calls(unit: Unit) -> Iterator[Bar]:
    timing = unit.timing
    if timing is None:
        return
    for kind in ("forward", "training"):
        own, eager = getattr(timing, kind), getattr(timing, f"eager_{kind}")
        if own is not None and eager is not None:
            yield Bar(f"{unit.form}, {kind}", own)
            yield Bar(f"eager, {kind}, beside {unit.form}", eager, "grid")


def pass_bars(optimization: Optimization) -> Drawing | None:
    """Return the latency of the graph before all passes, after each that was kept, and at the end."""
    after = [(each.name, each.latency) for each in optimization.passes]
    latencies: list[tuple[str, Latency | None, Role]] = [("before", optimization.latency_before, "grid")]
    latencies += [(f"after {name}", latency, "accent") for name, latency in after]
    if not any(latency for _, latency in after):
        latencies.append(("after", optimization.latency_after, "accent"))
    bars = [
        Bar(label, each.median, role, (each.lower_quartile, each.upper_quartile))
        for label, each, role in latencies
        if each is not None
    ]
    return bar_chart("latency in onnxruntime, median and quartiles", bars)
