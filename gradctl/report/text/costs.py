"""What forms cost, as rows of a table for screen and Markdown: first whether a form is right, then its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl.core.findings import Estimate, Measurement, Unit
from gradctl.report.text.inspection import format_size
from gradctl.report.text.optimization import format_seconds
from gradctl.report.text.wording import is_right, one_line

_HEADINGS = (
    *("form", "inputs", "right?", "capture", "first\ncall", "forward", "fwd+bwd", "time\n/ eager"),
    *("peak\nmemory", "file", "nodes", "pays\nafter"),
)
_INPUTS = 1
NAMES = 3  # the columns of text
# An interval that is farther from the median than this part of it is printed by its ends: they may be very uneven.
_WIDE = 0.25
_WORDS = {"pass": "yes", "fail": "WRONG", "inconclusive": "?", "skipped": "skipped"}


def cost_table(units: Sequence[Unit]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows, one for each form and size of the inputs; without sizes there is no column for them."""
    rows = [_row(unit, each) for unit in units for each in unit.measurements]
    kept = [number for number in range(len(_HEADINGS)) if number != _INPUTS or any(row[_INPUTS] for row in rows)]
    return [_HEADINGS[each] for each in kept], [[row[each] for each in kept] for row in rows]


def cost_legend(units: Sequence[Unit]) -> str:
    """Return how the numbers of the table were measured; empty without numbers."""
    measured = [each for unit in units for each in unit.measurements if each.rounds]
    if not measured:
        return ""
    counts = sorted({each.rounds for each in measured})
    rounds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    line = (
        f"time / eager: of fwd+bwd, or of forward if the form has no gradients; median of {rounds} rounds in turn with "
        "eager, ± its 95 % confidence interval."
    )
    loaded = [each.loaded_bytes for each in measured if each.loaded_bytes is not None]
    return f"{line} Of the peak memory, {format_size(max(loaded))} were there before the capture." if loaded else line


def _row(unit: Unit, cost: Measurement) -> list[str]:
    return [
        one_line(unit.form),
        cost.sizes or "",
        _verdict(unit, cost),
        _seconds(cost.capture),
        _seconds(cost.first_call),
        _seconds(cost.forward.median if cost.forward else None),
        _seconds(cost.training.median if cost.training else None),
        _ratio(cost.ratio),
        format_size(cost.peak_bytes) if cost.peak_bytes is not None else "-",
        format_size(cost.artifact_bytes) if cost.artifact_bytes is not None else "-",
        str(cost.nodes) if cost.nodes is not None else "-",
        _pays_after(cost),
    ]


def _verdict(unit: Unit, cost: Measurement) -> str:
    if cost.status != "complete":
        return cost.status
    return "DIFFERS" if cost.verdict == "fail" and is_right(unit) else _WORDS[cost.verdict]


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _ratio(ratio: Estimate | None) -> str:
    """Return ``0.61x ± 0.03``, or ``0.61x (0.43 to 1.92)`` if the interval is wide; with three digits of the median."""
    if ratio is None:
        return "-"
    decimals = 2 if ratio.median < 10 else 1 if ratio.median < 100 else 0
    text = f"{ratio.median:.{decimals}f}x"
    if ratio.margin is None:
        return text
    if ratio.margin > _WIDE * ratio.median:
        return f"{text} ({ratio.lower:.{decimals}f} to {ratio.upper:.{decimals}f})"
    return f"{text} ± {ratio.margin:.{decimals}f}"


def _pays_after(cost: Measurement) -> str:
    """Return the number of calls, ``never`` for a form that is slower than eager, or ``-`` if that is not known."""
    if cost.pays_after is not None:
        return str(cost.pays_after)
    is_slower = cost.ratio is not None and cost.ratio.lower is not None and cost.ratio.lower >= 1
    return "never" if is_slower else "-"
