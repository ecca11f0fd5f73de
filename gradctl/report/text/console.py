"""The report on a screen: a matrix of several units, then differences, the worst first, and last the verdict."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from gradctl.core.findings import Finding, Report, TensorResult, Unit
from gradctl.core.names import NOT_JUDGED, VERDICTS
from gradctl.core.numbers import format_number
from gradctl.core.optimization import Optimization
from gradctl.core.structure import Structure
from gradctl.report.text import wording
from gradctl.report.text.costs import NAMES, cost_legend, cost_table
from gradctl.report.text.matrix import matrix_of_forms, matrix_of_targets
from gradctl.report.text.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.text.screen import Screen
from gradctl.report.text.shared_causes import affected_line, affected_tensors, shared_causes
from gradctl.report.text.structure import structure_lines
from gradctl.report.text.variants import (
    STEP_HEADINGS,
    counted_in_a_step,
    differing_in_a_step,
    matrix_of_variants,
    step_row,
)


@dataclass(frozen=True, slots=True)
class _Limits:
    """The most that is printed: tensors with their elements, lines of anything else, units, rows of the matrix."""

    blocks: int = 5
    lines: int = 20
    units: int = 6
    rows: int = 40
    is_verbose: bool = False


_NORMAL = _Limits()
_BRIEF = _Limits(blocks=1, lines=4)  # of each of several units
_VERBOSE = _Limits(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize, is_verbose=True)
_ELSEWHERE = " (--verbose prints all)"

# ANSI codes: 1 bold, 2 dim, 31 red, 32 green, 33 yellow.
_BOLD = "1"
_STYLES = {
    **{"error": "1;31", "warning": "33", "note": "2"},
    **{"fail": "1;31", "pass": "1;32", "inconclusive": "1;33", "skipped": "33"},
}
# Explains most differences, so it comes before the numbers.
_BEFORE_NUMBERS = "GC220"


def render(
    report: Report, *, width: int | None = None, colour: bool = False, is_quiet: bool = False, is_verbose: bool = False
) -> str:
    """Return the report as text; colour only repeats what the words say.

    ``width`` is that of the terminal, None for a pipe or a file. If quiet, only the verdict is printed; if verbose,
    everything, and what a pass could have missed.
    """
    screen = Screen(width, colour=colour)
    if not is_quiet:
        _print_units(screen, report.units, _VERBOSE if is_verbose else _NORMAL)
    for line in wording.detection_limits(report.units) if is_verbose else ():
        screen.paragraph(line)
    screen.line(wording.verdict_line(report), _STYLES[report.verdict])
    return screen.text()


def _print_units(screen: Screen, units: Sequence[Unit], limits: _Limits) -> None:
    if len({unit.target for unit in units}) > 1:
        _print_targets(screen, units, limits)
        return
    if any(unit.training is not None for unit in units):
        screen.table(*matrix_of_variants(units), names=4)
        screen.line()
    elif any(unit.measurements for unit in units):
        screen.table(*cost_table(units), names=NAMES)
        screen.paragraph(cost_legend(units))
        screen.line()
    elif len(units) > 1:
        screen.table(*matrix_of_forms(units), names=4)
        screen.line()
    for unit in units:
        _print_unit(screen, unit, is_named=len(units) > 1, limits=limits)


def _print_targets(screen: Screen, units: Sequence[Unit], limits: _Limits) -> None:
    """Print the results of several targets: the matrix, the worst units at some length, the others in a line each."""
    ranked = wording.worst_units_first(units)
    selected, rest = {id(unit) for unit in ranked[: limits.rows]}, ranked[limits.rows :]
    screen.table(*matrix_of_targets([unit for unit in units if id(unit) in selected]))
    if rest:
        counts = Counter[str](unit.verdict for unit in rest)
        words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
        screen.paragraph(f"and {wording.counted(len(rest), 'more unit')}: {words}{_ELSEWHERE}")
    screen.line()
    _print_worst(screen, ranked, limits)
    _print_first(screen, wording.skip_lines(units), "reason", limits, Screen.paragraph)
    if not limits.is_verbose:
        _print_passing(screen, [unit for unit in units if unit.verdict == "pass"], limits)


def _print_worst(screen: Screen, units: Sequence[Unit], limits: _Limits) -> None:
    """Print the first units that do not pass at some length, the others in a line each."""
    shown = ("fail", "inconclusive", "pass") if limits.is_verbose else ("fail", "inconclusive")
    units = [unit for unit in units if unit.verdict in shown]
    for unit in units[: limits.units]:
        screen.line(wording.one_line(f"{unit.target}, {unit.form}"), _BOLD)
        screen.paragraph(wording.unit_line(unit))
        _print_unit(screen, unit, is_named=False, limits=limits if limits.is_verbose else _BRIEF)
        screen.line()
    others = [f"{unit.target}, {unit.form}: {wording.unit_line(unit)}" for unit in units[limits.units :]]
    _print_first(screen, others, "unit", limits, Screen.paragraph)


def _print_passing(screen: Screen, units: Sequence[Unit], limits: _Limits) -> None:
    """Print warnings, and notes on the configuration, of units that pass; count what else there is."""
    counts: Counter[str] = Counter()
    printed = []
    for unit in units:
        counts["not judged"] += sum(each.verdict in NOT_JUDGED and each.verdict != "frozen" for each in unit.tensors)
        for finding in wording.worst_first(unit.findings):
            if not finding.allowed and (finding.severity != "note" or finding.code.startswith("GC1")):
                printed.append(f"{unit.target}, {unit.form}: {finding.severity} {finding.code} {finding.message}")
            else:
                counts["allowed" if finding.allowed else "noted"] += 1
    _print_first(screen, printed, "finding", limits, Screen.paragraph)
    if words := [f"{counts[word]} {word}" for word in ("allowed", "noted", "not judged") if counts[word]]:
        screen.paragraph(f"in units that pass: {', '.join(words)}{_ELSEWHERE}")


def _section_of(finding: Finding, rows: Container[str | None], explained: Container[str | None]) -> str:
    """Return in which part of a unit a finding is printed; one whose cause is printed is "explained", and left out.

    ``rows`` are the names of the tensors that differ, ``explained`` of those wrong because of a Function or an output.
    """
    if finding.cause and finding.tensor in explained:
        return "explained"
    if finding.severity == "note":
        return "before" if finding.code == _BEFORE_NUMBERS else "note"
    has_row = finding.tensor in rows
    is_cause = finding.code in wording.FUNCTION_CODES or (finding.quantity == "output" and not has_row)
    if is_cause and not finding.allowed:
        return "headline"
    return "tensor" if has_row and finding.tensor not in explained else "other"


def _sections_of(unit: Unit, rows: Container[str | None], explained: Container[str | None]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = defaultdict(list)
    for finding in wording.worst_first(unit.findings):
        found[_section_of(finding, rows, explained)].append(finding)
    return found


def _print_unit(screen: Screen, unit: Unit, *, is_named: bool, limits: _Limits) -> None:
    """Print what of a unit is worth reading: wrong Functions, tensors, the other findings, notes."""
    _print_heading(screen, unit, is_named=is_named)
    if unit.training is not None:
        _print_training(screen, unit, limits)
        return
    different, explained = wording.differing_tensors(unit.tensors), affected_tensors(unit)
    found = _sections_of(unit, {tensor.tensor for tensor in different}, explained)
    _print_first(screen, found["before"], "note", limits, _print_note)
    _print_first(screen, found["headline"], "finding", limits, _print_finding)
    affected = [tensor for tensor in different if tensor.tensor in explained]
    _print_affected(screen, unit, affected, len(found["headline"]), limits)
    tensors = [tensor for tensor in different if tensor.tensor not in explained]
    tensors = _print_shared(screen, unit, found, tensors, limits)
    for tensor in tensors[: limits.blocks]:
        _print_tensor(screen, unit, tensor, found["tensor"], is_named=is_named)
    if rest := tensors[limits.blocks :]:
        _print_rows(screen, unit, rest, limits)
        screen.line()
    _print_first(screen, found["other"], "finding", limits, _print_finding)
    _print_first(screen, found["note"], "note", limits, _print_note)
    for line in wording.not_judged(unit.tensors):
        screen.paragraph(line, _STYLES["note"])
    if limits.is_verbose:
        _print_rows(screen, unit, unit.tensors, limits)
        screen.line(unit.details or "")


def _print_training(screen: Screen, unit: Unit, limits: _Limits) -> None:
    """Print the findings, how many tensors differ after the first step that differs, and the worst of them."""
    for finding in unit.findings:
        (_print_note if finding.severity == "note" else _print_finding)(screen, finding)
        if finding.cause_message and not finding.allowed:
            screen.paragraph(finding.cause_message, indent=2)
    if different := differing_in_a_step(unit.tensors):
        screen.paragraph(counted_in_a_step(unit), indent=2)
        rows = [step_row(each) for each in different[: limits.blocks]]
        screen.table(STEP_HEADINGS, rows, names=3, indent=2)
        screen.line()
    for line in wording.not_judged(unit.tensors):
        screen.paragraph(f"{unit.form}: {line}", _STYLES["note"])
    if limits.is_verbose:
        screen.table(STEP_HEADINGS, [step_row(each) for each in unit.tensors], names=3)
        screen.line(unit.details or "")


def _print_heading(screen: Screen, unit: Unit, *, is_named: bool) -> None:
    if is_named and unit.reason:
        screen.paragraph(f"{unit.form}  {unit.verdict if unit.status == 'complete' else unit.status}: {unit.reason}")
    elif unit.reason and unit.verdict in ("pass", "fail"):  # of others the last line has it
        screen.paragraph(unit.reason)
    if unit.optimization is not None:
        _print_optimization(screen, unit.optimization)
    if unit.structure is not None:
        _print_structure(screen, unit.structure)


def _print_optimization(screen: Screen, optimization: Optimization) -> None:
    if rows := pass_rows(optimization):
        screen.table(PASS_HEADINGS, rows, names=2)
        screen.line()
    for line in notes(optimization):
        screen.paragraph(line)
    screen.line()
    screen.table(SIZE_HEADINGS, size_rows(optimization), names=1)
    screen.line()


def _print_structure(screen: Screen, structure: Structure) -> None:
    headline, *lines = structure_lines(structure)
    screen.paragraph(headline)
    for line in lines:
        screen.paragraph(line, indent=2, hanging=4)
    if lines:
        screen.line()


def _print_affected(screen: Screen, unit: Unit, affected: Sequence[TensorResult], causes: int, limits: _Limits) -> None:
    """Print the tensors that some causes make wrong, one a line, and the worst elements of the worst."""
    if not affected:
        return
    screen.paragraph(affected_line(unit, affected, causes=causes), indent=2)
    _print_rows(screen, unit, affected, limits, indent=2)
    worst = affected[0]
    if worst.worst:
        known = (
            f" ({_of_elements(worst)} {'are wrong' if unit.form == 'eager' else 'differ'})"
            if worst.elements_wrong is not None
            else ""
        )
        screen.paragraph(f"worst elements of {worst.tensor}{known}:", indent=2)
        _print_elements(screen, unit, worst, indent=2)
    screen.line()


def _print_shared(
    screen: Screen, unit: Unit, found: dict[str, list[Finding]], tensors: Sequence[TensorResult], limits: _Limits
) -> list[TensorResult]:
    """Print findings of one cause once, with the tensors that they make wrong; return the other tensors."""
    printed: list[Finding] = []
    grouped: set[str] = set()
    for shared in shared_causes(found["tensor"], tensors):
        _print_first(screen, shared.stated, "finding", limits, _print_finding)
        _print_affected(screen, unit, shared.tensors, len(shared.stated), limits)
        printed += shared.findings
        grouped |= {tensor.tensor for tensor in shared.tensors}
    found["other"] += [each for each in found["tensor"] if each.tensor in grouped and each not in printed]
    return [tensor for tensor in tensors if tensor.tensor not in grouped]


def _print_tensor(
    screen: Screen, unit: Unit, tensor: TensorResult, findings: Sequence[Finding], *, is_named: bool
) -> None:
    """Print one tensor: its name, its error, its worst elements, and those of the findings that are about it."""
    title = [unit.form] if is_named else []
    title += [wording.tensor_words(unit)[tensor.verdict], tensor.tensor, wording.shape_and_dtype(tensor)]
    if tensor.elements_wrong is not None:
        title.append(_of_elements(tensor))
    screen.line("  ".join(title), _BOLD)
    if tensor.tied:
        screen.paragraph(f"tied with {', '.join(tensor.tied)}")
    screen.line(f"relative error {format_number(tensor.error)} (tolerance {format_number(tensor.budget)})")
    if tensor.worst:
        _print_elements(screen, unit, tensor)
    for finding in findings:
        if finding.tensor == tensor.tensor:
            _print_finding(screen, finding, indent=2)
    screen.line()


def _of_elements(tensor: TensorResult) -> str:
    return f"{tensor.elements_wrong} of {wording.counted(math.prod(tensor.shape), 'element')}"


def _print_elements(screen: Screen, unit: Unit, tensor: TensorResult, *, indent: int = 0) -> None:
    screen.table(*wording.element_table(unit, tensor), names=1, indent=indent)


def _print_rows(
    screen: Screen, unit: Unit, tensors: Sequence[TensorResult], limits: _Limits, *, indent: int = 0
) -> None:
    if tensors:
        rows = [wording.tensor_row(unit, each) for each in tensors[: limits.lines]]
        screen.table(wording.TENSOR_HEADINGS, rows, names=3, indent=indent)
    _print_more(screen, len(tensors) - limits.lines, "tensor", indent=indent)


def _print_finding(screen: Screen, finding: Finding, *, indent: int = 0) -> None:
    """Print one finding: message, location, the option that accepts it, and the hint."""
    is_stated = finding.cause is None or finding.cause in finding.message
    code = finding.code if is_stated else f"{finding.code} ({finding.cause})"
    text = f"{wording.severity_word(finding)} {code} {finding.message}"
    screen.paragraph(text, _STYLES[finding.severity], indent=indent)
    allow = finding.allow if not finding.allowed else None
    lines = {"at": wording.location_of(finding), "repro:": finding.repro, "if this is intentional, add --allow": allow}
    for label, value in lines.items():
        if value:
            screen.line(f"{label} {value}", indent=indent + 2)
    if finding.hint and not finding.allowed:
        screen.paragraph(finding.hint, indent=indent + 2)


def _print_note(screen: Screen, note: Finding) -> None:
    screen.paragraph(wording.summary_of(note), _STYLES["note"])


def _print_first(
    screen: Screen, items: Sequence[Any], noun: str, limits: _Limits, print_one: Callable[[Screen, Any], None]
) -> None:
    for item in items[: limits.lines]:
        print_one(screen, item)
    _print_more(screen, len(items) - limits.lines, noun)


def _print_more(screen: Screen, count: int, noun: str, *, indent: int = 0) -> None:
    if count > 0:
        screen.paragraph(f"and {wording.counted(count, f'more {noun}')}{_ELSEWHERE}", indent=indent)
