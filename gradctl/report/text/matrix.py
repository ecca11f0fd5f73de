"""The table of units on a screen: forms of one target, or the results of many targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gradctl.core.findings import Unit
from gradctl.core.names import Quantity, TensorVerdict
from gradctl.report.text.wording import one_line, tensor_words, verdict_word

QUANTITIES: tuple[Quantity, ...] = ("output", "gradient", "buffer")
_TIMES = ("capture", "forward\nspeedup", "training\nspeedup")


def matrix_of_forms(units: Sequence[Unit]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for the forms of one target, each cell the worst verdict on a quantity.

    The last columns are the time to capture and the speedup over eager (eager's time divided by the form's), if a form
    differs from eager by more than the noise.
    """
    headings = ["form", "outputs", "gradients", "buffers", *_TIMES]
    rows = [[unit.form, *_cells(unit, unit.status == "complete"), *_times(unit)] for unit in units]
    kept = [number for number in range(len(headings)) if number < 4 or any(row[number] != "-" for row in rows)]
    return [headings[each] for each in kept], [[row[each] for each in kept] for row in rows]


def matrix_of_targets(units: Sequence[Unit]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for units of several targets; a target is named once for all its rows."""
    rows = []
    for number, unit in enumerate(units):
        is_first = number == 0 or units[number - 1].target != unit.target
        # The verdict of an unsupported form says "skipped" already.
        cells = _cells(unit, unit.status in ("complete", "unsupported"))
        rows.append([one_line(unit.target) if is_first else "", one_line(unit.form), verdict_word(unit), *cells])
    columns = 6 if any(row[5] != "-" for row in rows) else 5
    headings = ["target", "form", "verdict", "outputs", "gradients", "buffers"]
    return headings[:columns], [row[:columns] for row in rows]


def _cells(unit: Unit, is_complete: bool) -> list[str]:
    words = [quantity_word(unit, quantity) for quantity in QUANTITIES]
    return words if is_complete else [unit.status, *words[1:]]


def quantity_word(unit: Unit, quantity: Quantity) -> str:
    """Return the word for the worst verdict on the unit's tensors of this quantity."""
    verdicts: set[TensorVerdict] = {tensor.verdict for tensor in unit.tensors if tensor.quantity == quantity}
    return next((word for verdict, word in tensor_words(unit).items() if verdict in verdicts), "-")


def _times(unit: Unit) -> list[str]:
    capture = f"{unit.timing.capture:.2f} s" if unit.timing else "-"
    return [capture, _speedup(unit, "forward"), _speedup(unit, "training")]


def _speedup(unit: Unit, kind: Literal["forward", "training"]) -> str:
    """Return eager's time divided by the form's, or ``-`` if it is within the noise of 1."""
    timing = unit.timing
    form, eager, noise = (getattr(timing, name, None) for name in (kind, f"eager_{kind}", f"{kind}_noise"))
    if not form or not eager or noise is None or abs(eager / form - 1) <= noise:
        return "-"
    return f"{eager / form:.2f}x"
