"""The report on a screen: a matrix where there are several units, what differs worst first, and last the verdict.

Names and messages are data: nothing in them is markup. What is there to be pasted (a path, an ``--allow``, the verdict)
is never broken; everything else keeps to the width.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradctl.core.findings import Finding, Report, TensorResult, Unit
from gradctl.core.names import NOT_JUDGED, UnitVerdict
from gradctl.core.numbers import format_number
from gradctl.core.optimization import Optimization
from gradctl.core.structure import Structure
from gradctl.report.text.matrix import data, matrix_of_forms, matrix_of_targets, plain_table
from gradctl.report.text.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.text.structure import structure_lines
from gradctl.report.text.wording import (
    FUNCTION_CODES,
    affected_tensors,
    counted,
    counted_as_judged,
    detection_limits,
    differing_tensors,
    not_judged,
    one_line,
    printable,
    shape_and_dtype,
    shared_causes,
    skip_lines,
    tensor_words,
    unit_line,
    verdict_line,
    worst_first,
    worst_units_first,
)


@dataclass(frozen=True, slots=True)
class _Limits:
    """The most of a unit that is shown: tensors with their elements, and lines of anything else."""

    blocks: int
    lines: int


# A screen is read, a file is searched: what goes beyond these is counted, and stands in --format json.
_FULL = _Limits(blocks=5, lines=20)
_BRIEF = _Limits(blocks=1, lines=4)
_MOST_UNITS = 6
_MOST_LINES = 20
_ELSEWHERE = " (--format json has them all)"

_STYLES = {
    "error": "bold red",
    "warning": "yellow",
    "note": "dim",
    "fail": "bold red",
    "pass": "bold green",
    "inconclusive": "bold yellow",
    "skipped": "yellow",
}
# Explains most differences, so it comes before the numbers.
_BEFORE_NUMBERS = "GC220"


def render(report: Report, *, width: int = 80, colour: bool = False, verbose: bool = False) -> str:
    """Return the report for a screen of ``width`` columns; colour only repeats what the words say.

    ``verbose`` adds what a pass could have missed.
    """
    screen = io.StringIO()
    console = Console(
        file=screen,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    if len({unit.target for unit in report.units}) > 1:
        _print_targets(console, report.units)
    else:
        several = len(report.units) > 1
        if several:
            console.print(matrix_of_forms(report.units), "")
        for unit in report.units:
            _print_unit(console, unit, named=several)
    for line in detection_limits(report.units) if verbose else ():
        _print_indented(console, line, indent=0)
    _print_whole(console, printable(verdict_line(report)), _STYLES[report.verdict])
    lines = "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())
    return re.sub("\n{3,}", "\n\n", lines)


def _print_targets(console: Console, units: Sequence[Unit]) -> None:
    """Print what several targets did: the matrix, the worst units at some length, the others in a line each."""
    table, rest = matrix_of_targets(units, width=console.width)
    console.print(table)
    if rest:
        verdicts = Counter(unit.verdict for unit in rest)
        counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in get_args(UnitVerdict) if verdicts[verdict])
        _print_indented(console, f"and {counted(len(rest), 'more unit')}: {counts}{_ELSEWHERE}", indent=0)
    console.print()
    bad = [unit for unit in worst_units_first(units) if unit.verdict in ("fail", "inconclusive")]
    for unit in bad[:_MOST_UNITS]:
        _print_whole(console, one_line(f"{unit.target}, {unit.form}"), "bold")
        _print_indented(console, unit_line(unit), indent=0)
        _print_unit(console, unit, named=False, limits=_BRIEF)
        console.print()
    others = [f"{unit.target}, {unit.form}: {unit_line(unit)}" for unit in bad[_MOST_UNITS:]]
    _print_lines(console, others, "unit")
    _print_lines(console, skip_lines(units), "reason")
    _print_of_passing(console, [unit for unit in units if unit.verdict == "pass"])


def _print_of_passing(console: Console, units: Sequence[Unit]) -> None:
    """Print warnings, and notes on the configuration, of units that pass; what else was noted or allowed is counted."""
    told = [
        f"{unit.target}, {unit.form}: {finding.severity} {finding.code} {finding.message}"
        for unit in units
        for finding in worst_first(unit.findings)
        if _is_told(finding)
    ]
    _print_lines(console, told, "finding")
    allowed = sum(finding.allowed for unit in units for finding in unit.findings)
    notes = sum(not finding.allowed and not _is_told(finding) for unit in units for finding in unit.findings)
    apart = sum(
        tensor.verdict in NOT_JUDGED and tensor.verdict != "frozen" for unit in units for tensor in unit.tensors
    )
    words = {"allowed": allowed, "noted": notes, "not judged": apart}
    counts = [f"{count} {word}" for word, count in words.items() if count]
    if counts:
        _print_indented(console, f"in units that pass: {', '.join(counts)}{_ELSEWHERE}", indent=0)


def _print_lines(console: Console, lines: Sequence[str], noun: str) -> None:
    for line in lines[:_MOST_LINES]:
        _print_indented(console, line, indent=0)
    _print_more(console, len(lines) - _MOST_LINES, noun, indent=0)


def _is_told(finding: Finding) -> bool:
    """Return whether a finding of a unit that passes is worth reading."""
    return not finding.allowed and (finding.severity != "note" or finding.code.startswith("GC1"))


def _print_unit(console: Console, unit: Unit, *, named: bool, limits: _Limits = _FULL) -> None:
    """Print what of a unit is worth reading: Functions that are named, tensors, the other findings, notes."""
    if named and unit.reason:
        _print_indented(console, f"{unit.form}  {unit.status}: {unit.reason}", indent=0)
    if unit.optimization is not None:
        _print_optimization(console, unit.optimization)
    if unit.structure is not None:
        _print_structure(console, unit.structure)
    spoiled = affected_tensors(unit)
    findings = [finding for finding in worst_first(unit.findings) if finding.tensor not in spoiled or not finding.cause]
    loud = differing_tensors(unit.tensors)
    headlines = _headlines(findings, loud)
    blocks = [tensor for tensor in loud if tensor.tensor not in spoiled]
    shared = shared_causes([finding for finding in findings if finding not in headlines], blocks)
    grouped = {tensor.tensor for _, tensors in shared for tensor in tensors}
    codes = {finding.code for causes, _ in shared for finding in causes}
    findings = [each for each in findings if each.tensor not in grouped or each.code not in codes]
    blocks = [tensor for tensor in blocks if tensor.tensor not in grouped]
    shown = blocks[: limits.blocks]
    about_shown = {tensor.tensor for tensor in shown}

    _print_notes(console, [finding for finding in findings if finding.code == _BEFORE_NUMBERS], limits)
    _print_findings(console, headlines, limits)
    _print_spoiled(console, unit, [tensor for tensor in loud if tensor.tensor in spoiled], len(headlines), limits)
    for causes, tensors in shared:
        _print_findings(console, causes, limits)
        _print_spoiled(console, unit, tensors, len(causes), limits)
    for tensor in shown:
        _print_tensor(console, unit, tensor, named=named)
        for finding in findings:
            if finding.tensor == tensor.tensor and finding.severity != "note" and finding not in headlines:
                _print_finding(console, finding, indent=2)
        console.print()
    _print_rest(console, unit, blocks[limits.blocks :], limits)
    told = {tensor.tensor for tensor in blocks}
    others = [f for f in findings if f not in headlines and f.severity != "note" and f.tensor not in about_shown]
    _print_findings(console, [finding for finding in others if finding.tensor not in told], limits)
    rest = [finding for finding in findings if finding.severity == "note" and finding.code != _BEFORE_NUMBERS]
    _print_notes(console, rest, limits)
    for line in not_judged(unit.tensors):
        _print_indented(console, line, _STYLES["note"], indent=0)


def _print_optimization(console: Console, optimization: Optimization) -> None:
    """Print what each pass did, what changed, and the graph before and after."""
    passes = plain_table()
    for number, heading in enumerate(PASS_HEADINGS):
        passes.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in pass_rows(optimization):
        passes.add_row(*map(data, row))
    if passes.row_count:
        console.print(passes, "")
    for line in notes(optimization):
        _print_indented(console, line, indent=0)
    sizes = plain_table()
    for number, heading in enumerate(SIZE_HEADINGS):
        sizes.add_column(heading, justify="left" if number < 1 else "right", overflow="fold")
    for row in size_rows(optimization):
        sizes.add_row(*map(data, row))
    console.print("", sizes, "")


def _print_structure(console: Console, structure: Structure) -> None:
    """Print how the graph differs from the one it was held against, what is alike in one line."""
    headline, *lines = structure_lines(structure)
    _print_indented(console, headline, indent=0)
    for line in lines:
        # Broken here and not by rich, so that what goes on is told from what is new.
        parts = textwrap.wrap(line, max(20, console.width - 2), subsequent_indent="    ", break_on_hyphens=False)
        for part in parts:
            _print_indented(console, part)
    if lines:
        console.print()


def _headlines(findings: Sequence[Finding], loud: Sequence[TensorResult]) -> list[Finding]:
    """Return what spoils tensors and stands before them: wrong Functions, then outputs that are NaN and have no row."""
    rows = {tensor.tensor for tensor in loud}
    serious = [finding for finding in findings if not finding.allowed and finding.severity != "note"]
    functions = [finding for finding in serious if finding.code in FUNCTION_CODES]
    return functions + [each for each in serious if each.quantity == "output" and each.tensor not in rows]


def _print_spoiled(console: Console, unit: Unit, spoiled: Sequence[TensorResult], causes: int, limits: _Limits) -> None:
    """Print the tensors behind a wrong Function or output, one a line, and the worst elements of the worst of them."""
    if not spoiled:
        return
    verb, gradients = "this spoils" if causes < 2 else "these spoil", counted_as_judged(unit, "gradient")
    _print_indented(console, f"{verb} {len(spoiled)} of {gradients}:")
    console.print(Padding(_compact(unit, spoiled[: limits.lines]), (0, 0, 0, 2)))
    _print_more(console, len(spoiled) - limits.lines, "tensor")
    if spoiled[0].worst:
        known = f" ({_of_elements(spoiled[0])} wrong)" if spoiled[0].elements_wrong is not None else ""
        _print_indented(console, f"the worst elements of {spoiled[0].tensor}{known}:")
        console.print(Padding(_elements(unit, spoiled[0]), (0, 0, 0, 2)))
    console.print()


def _print_tensor(console: Console, unit: Unit, tensor: TensorResult, *, named: bool) -> None:
    """Print one tensor: its name, how far off it is, and its worst elements."""
    title = [unit.form] if named else []
    title += [tensor_words(unit)[tensor.verdict], tensor.tensor, shape_and_dtype(tensor)]
    if tensor.elements_wrong is not None:
        title.append(_of_elements(tensor))
    console.print(Text(printable("  ".join(title)), style="bold", overflow="fold"))
    if tensor.tied:
        _print_indented(console, f"tied with {', '.join(tensor.tied)}", indent=0)
    console.print(Text(f"error {format_number(tensor.error)}  budget {format_number(tensor.budget)}"))
    if tensor.worst:
        console.print(_elements(unit, tensor))


def _of_elements(tensor: TensorResult) -> str:
    return f"{tensor.elements_wrong} of {counted(math.prod(tensor.shape), 'element')}"


def _elements(unit: Unit, tensor: TensorResult) -> Table:
    """Return the worst elements of a tensor; numbers to the right, none of them ever cut."""
    table = plain_table()
    table.add_column("index", overflow="fold")
    of_eager = unit.form == "eager"
    headings = ["autograd"] if of_eager else ["eager", unit.form]
    for heading in [*headings, "finite diff", "abs error", "rel error"]:
        table.add_column(printable(heading), justify="right", no_wrap=True)
    for element in tensor.worst:
        values = [element.reference] if of_eager else [element.reference, element.candidate]
        numbers = [*values, element.finite_difference, element.absolute_error, element.relative_error]
        index = f"{list(element.index)} {element.component or ''}".rstrip()
        table.add_row(index, *map(format_number, numbers))
    return table


def _compact(unit: Unit, tensors: Sequence[TensorResult]) -> Table:
    """Return one line a tensor."""
    table = plain_table()
    table.show_header = False
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for _ in range(3):
        table.add_column(no_wrap=True)
    for tensor in tensors:
        errors = f"error {format_number(tensor.error)}", f"budget {format_number(tensor.budget)}"
        table.add_row(data(tensor.tensor), shape_and_dtype(tensor), tensor_words(unit)[tensor.verdict], *errors)
    return table


def _print_rest(console: Console, unit: Unit, tensors: Sequence[TensorResult], limits: _Limits) -> None:
    if tensors:
        console.print(_compact(unit, tensors[: limits.lines]))
        _print_more(console, len(tensors) - limits.lines, "tensor", indent=0)
        console.print()


def _print_findings(console: Console, findings: Sequence[Finding], limits: _Limits) -> None:
    for finding in findings[: limits.lines]:
        _print_finding(console, finding)
    _print_more(console, len(findings) - limits.lines, "finding", indent=0)


def _print_finding(console: Console, finding: Finding, *, indent: int = 0) -> None:
    """Print one finding: what, where, the line that accepts it, and what to do."""
    word = "allowed" if finding.allowed else finding.severity
    is_told = finding.cause is None or finding.cause in finding.message
    code = finding.code if is_told else f"{finding.code} ({finding.cause})"
    _print_indented(console, f"{word} {code} {finding.message}", _STYLES[finding.severity], indent=indent)
    below = indent + 2
    if finding.location is not None and str(finding.location):
        _print_whole(console, " " * below + printable(f"at {finding.location}"))
    if finding.repro:
        _print_whole(console, " " * below + printable(f"repro: {finding.repro}"))
    if finding.allowed:
        return
    if finding.allow:
        _print_whole(console, " " * below + printable(f"if it is meant: --allow {finding.allow}"))
    if finding.hint:
        _print_indented(console, finding.hint, indent=below)


def _print_notes(console: Console, notes: Sequence[Finding], limits: _Limits) -> None:
    """Print notes last and short: one sentence and a place."""
    for note in notes[: limits.lines]:
        word = "allowed" if note.allowed else "note"
        place = f" ({note.location})" if note.location is not None and str(note.location) else ""
        _print_indented(console, f"{word} {note.code} {note.message}{place}", _STYLES["note"], indent=0)
    _print_more(console, len(notes) - limits.lines, "note", indent=0)


def _print_more(console: Console, count: int, noun: str, *, indent: int = 2) -> None:
    if count > 0:
        _print_indented(console, f"and {counted(count, f'more {noun}')}{_ELSEWHERE}", indent=indent)


def _print_indented(console: Console, text: str, style: str = "", *, indent: int = 2) -> None:
    """Print text that may be broken between words, all its lines indented."""
    console.print(Padding(Text(printable(text), style=style, overflow="fold"), (0, 0, 0, indent)))


def _print_whole(console: Console, text: str, style: str = "") -> None:
    """Print text that is there to be pasted: on one line, however long."""
    console.print(Text(text, style=style), soft_wrap=True)
