"""The table of units on a screen: forms of one target, or what many targets did, in a bounded number of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from typing import Literal

from rich.table import Table
from rich.text import Text

from gradctl.core.findings import Unit
from gradctl.core.names import Quantity, TensorVerdict
from gradctl.report.text.wording import one_line, printable, tensor_words, verdict_word, worst_units_first

QUANTITIES: tuple[Quantity, ...] = ("output", "gradient", "buffer")
_MOST_ROWS = 40
_WIDEST_FORM = 24
_NARROWEST_TARGET = 16


def matrix_of_forms(units: Sequence[Unit]) -> Table:
    """Return the table of the forms of one target by quantity, each cell the worst verdict in it.

    It ends in the time to capture and the speedup over eager (eager's time by the form's) of those columns in which a
    form differs from eager by more than the noise.

    Args:
        units: of one target.
    """
    table = plain_table()
    table.add_column("form", overflow="fold")
    for heading in ("outputs", "gradients", "buffers"):
        table.add_column(heading, no_wrap=True)
    columns = {
        "capture": [f"{unit.timing.capture:.2f} s" if unit.timing else "-" for unit in units],
        "forward\nspeedup": [_speedup(unit, "forward") for unit in units],
        "training\nspeedup": [_speedup(unit, "training") for unit in units],
    }
    columns = {heading: column for heading, column in columns.items() if any(each != "-" for each in column)}
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for unit, *times in zip(units, *columns.values(), strict=True):
        cells = [cell(unit, quantity) for quantity in QUANTITIES]
        if unit.status != "complete":
            cells[0] = unit.status
        table.add_row(data(unit.form), *cells, *times)
    return table


def matrix_of_targets(units: Sequence[Unit], *, width: int) -> tuple[Table, list[Unit]]:
    """Return the table of units of several targets, and the units that have no row in it.

    Above 40 units those have a row that are worst; a target is named once for all its rows, and folded after a ``/``.
    """
    kept = {id(unit) for unit in worst_units_first(units)[:_MOST_ROWS]}
    shown = [unit for unit in units if id(unit) in kept]
    quantities = [each for each in QUANTITIES if each != "buffer" or any(cell(unit, each) != "-" for unit in shown)]
    headings = ["form", "verdict", *(f"{quantity}s" for quantity in quantities)]
    rows = [[one_line(unit.form), verdict_word(unit), *_judged(unit, quantities)] for unit in shown]
    widths = [max(map(len, column)) + 2 for column in zip(headings, *rows, strict=True)]
    room = max(_NARROWEST_TARGET, width - min(widths[0], _WIDEST_FORM + 2) - sum(widths[1:]))
    table = plain_table()
    table.add_column("target", overflow="fold")
    table.add_column("form", overflow="fold", max_width=_WIDEST_FORM)
    for heading in headings[1:]:
        table.add_column(heading, no_wrap=True)
    cells = iter(rows)
    for target, group in groupby(shown, key=lambda unit: unit.target):
        for line, row in zip_longest(_folded(one_line(target), room), [next(cells) for _ in group]):
            table.add_row(*map(Text, [line or "", *(row or [])]))
    return table, [unit for unit in units if id(unit) not in kept]


def cell(unit: Unit, quantity: Quantity) -> str:
    """Return the word of the worst verdict on the unit's tensors of this quantity."""
    verdicts: set[TensorVerdict] = {tensor.verdict for tensor in unit.tensors if tensor.quantity == quantity}
    return next((word for verdict, word in tensor_words(unit).items() if verdict in verdicts), "-")


def plain_table() -> Table:
    """Return a table without lines, its columns two blanks apart."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")


def _judged(unit: Unit, quantities: Sequence[Quantity]) -> list[str]:
    words = [cell(unit, quantity) for quantity in quantities]
    if unit.status not in ("complete", "unsupported"):  # the verdict says "skipped" of what is unsupported
        words[0] = unit.status
    return words


def _folded(name: str, room: int) -> Iterator[str]:
    """Yield ``name`` in lines of ``room`` columns, broken after a ``/``, ``.`` or ``:`` where there is one."""
    while len(name) > room:
        breaks = [found.end() for found in re.finditer("[/:.]", name[:room])]
        end = breaks[-1] if breaks and breaks[-1] > room // 2 else room
        yield name[:end]
        name = name[end:]
    yield name


def _speedup(unit: Unit, kind: Literal["forward", "training"]) -> str:
    """Return eager's time by the form's, or ``-`` if it is within the noise of 1."""
    timing = unit.timing
    form, eager, noise = (getattr(timing, name, None) for name in (kind, f"eager_{kind}", f"{kind}_noise"))
    if not form or not eager or noise is None or abs(eager / form - 1) <= noise:
        return "-"
    return f"{eager / form:.2f}x"


def data(text: str) -> Text:
    """Return a name for a table: nothing in it is markup, and what is long is folded."""
    return Text(printable(text), overflow="fold")
