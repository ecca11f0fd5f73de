"""The report as one HTML file that needs nothing else: it can be attached to an issue, and read on a phone or on paper.

The worst units come first and in full; of units that pass, and of what is beyond the limits below, there are only
lines, so that a report of thousands of units remains a page.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from gradctl.core.findings import Finding, Report, SourceExcerpt, TensorResult, Unit
from gradctl.core.names import NOT_JUDGED
from gradctl.report.figures.drawing import Drawing, Role, finite
from gradctl.report.figures.error_strips import error_axis, error_scale, error_strip
from gradctl.report.figures.graph_picture import graph_picture
from gradctl.report.figures.heat_map import heat_map
from gradctl.report.figures.step_chart import step_chart
from gradctl.report.figures.timing_bars import call_bars, pass_bars, unit_bars
from gradctl.report.figures.verdict_matrix import quantity_marks, unit_word
from gradctl.report.html.rule_pages import rule_page
from gradctl.report.html.svg import svg
from gradctl.report.text import wording
from gradctl.report.text.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.text.shared_causes import findings_by_cause
from gradctl.report.text.structure import structure_lines

# Units with figures, and rows of tensors in all units together.
_MOST_IN_FULL = 40
_MOST_ROWS_OF_ALL, _FEWEST_ROWS, _MOST_ROWS = 1500, 4, 60
_MOST_FINDINGS = 30
_MOST_EVIDENCE = 3  # tensors of a unit
_MOST_TARGETS = 600
_MOST_LISTED = 2000
_CLASSES = {"pass": "good", "fail": "bad", "inconclusive": "warn", "skipped": "muted"}


@dataclass(frozen=True, slots=True)
class _Cell:
    """One unit in the matrix; ``marks`` are class, letter and meaning for each of its quantities."""

    link: str
    word: str
    css: str
    marks: list[tuple[Role, str, str]]


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The figures and elements of one tensor that differs."""

    tensor: TensorResult
    figures: list[Markup]
    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class _Section:
    """A unit of the page; ``is_full`` says whether it has figures."""

    unit: Unit
    key: str
    line: str
    css: str
    is_full: bool
    findings: list[Finding]
    more_findings: int
    axis: Markup | None
    tensors: list[tuple[list[str], Markup]]
    more_tensors: int
    evidence: list[_Evidence]
    graphs: list[tuple[str, Markup]]


def render(report: Report) -> str:
    """Return the report as an HTML page: the verdict, a matrix of several units, units, and the rules they name."""
    return _environment().get_template("report.html.jinja").render(_content(report))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradctl.report.html", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: wording.printable(value) if type(value) is str else value,
    )
    environment.globals.update(
        location_of=wording.location_of,
        severity_word=wording.severity_word,
        shape_and_dtype=wording.shape_and_dtype,
        not_judged=wording.not_judged,
        pass_headings=PASS_HEADINGS,
        size_headings=SIZE_HEADINGS,
        pass_rows=pass_rows,
        size_rows=size_rows,
        optimization_notes=notes,
        structure_lines=structure_lines,
        counted=wording.counted,
    )
    return environment


def _content(report: Report) -> dict[str, Any]:
    units = wording.worst_units_first(report.units)
    keys = {id(unit): f"u{number}" for number, unit in enumerate(units, 1)}
    rows = min(_MOST_ROWS, max(_FEWEST_ROWS, _MOST_ROWS_OF_ALL // (len(units) or 1)))
    sections = [
        _section(unit, keys[id(unit)], rows, is_full=number < _MOST_IN_FULL)
        for number, unit in enumerate(units[:_MOST_LISTED])
    ]
    used = {code for unit in report.units for each in unit.findings for code in (each.code, each.cause) if code}
    figures = [("Time of each unit", unit_bars(units)), ("One call", call_bars(report.units))]
    return {
        "report": report,
        "environment": sorted(report.environment.items()),
        "css": _CLASSES["inconclusive" if report.status == "interrupted" else report.verdict],
        "verdict": wording.verdict_line(report),
        "several_targets": len({unit.target for unit in units}) > 1,
        "matrix": _matrix(report.units, keys) if len(units) > 1 else None,
        "bars": [(name, svg(drawing)) for name, drawing in figures if drawing is not None],
        "open_sections": [each for each in sections if _is_open(each.unit, units)],
        "quiet_sections": [each for each in sections if not _is_open(each.unit, units)],
        "more_units": len(units) - len(sections),
        "limits": wording.detection_limits(report.units[:_MOST_LISTED]),
        "rules": {code: found for code in sorted(used) if (found := rule_page(code)) is not None},
        "sources": {(each.file, each.line): each for each in report.sources},
        "pass_figure": lambda optimization: _drawn(pass_bars(optimization)),
        "numbered": _numbered,
    }


def _is_open(unit: Unit, units: Sequence[Unit]) -> bool:
    """Return whether a unit is shown, not folded."""
    return unit.verdict in ("fail", "inconclusive") or len(units) == 1


def _drawn(drawing: Drawing | None) -> Markup | None:
    return svg(drawing) if drawing is not None else None


def _numbered(excerpt: SourceExcerpt) -> list[tuple[int, str, bool]]:
    """Return number and text of each line, and whether it is the one that a finding names."""
    return [(number, text, number == excerpt.line) for number, text in enumerate(excerpt.lines, excerpt.first_line)]


def _matrix(units: Sequence[Unit], keys: dict[int, str]) -> dict[str, Any]:
    forms = list(dict.fromkeys(unit.form for unit in units))
    cells: dict[str, dict[str, list[_Cell]]] = {}
    for unit in units:
        cells.setdefault(unit.target, {}).setdefault(unit.form, []).append(_cell(unit, keys[id(unit)]))
    rows = [(target, [(form, cells[target].get(form, [])) for form in forms]) for target in list(cells)[:_MOST_TARGETS]]
    return {"forms": forms, "rows": rows, "more": len(cells) - len(rows)}


def _cell(unit: Unit, key: str) -> _Cell:
    return _Cell(key, unit_word(unit), _CLASSES[unit.verdict], quantity_marks(unit))


def _section(unit: Unit, key: str, rows: int, *, is_full: bool) -> _Section:
    findings = findings_by_cause(unit)
    differing = wording.differing_tensors(unit.tensors)
    others = [each for each in unit.tensors if each not in differing and each.verdict not in NOT_JUDGED]
    ranked = [*differing, *sorted(others, key=_part_of_tolerance, reverse=True)]
    shown = ranked[:rows]
    scale = error_scale(shown)
    has_numbers = any(each.error is not None for each in shown)
    tensors = [(wording.tensor_row(unit, each), svg(error_strip(each, scale))) for each in shown]
    parts = unit.structure.parts if unit.structure else unit.optimization.parts if unit.optimization else ()
    return _Section(
        unit=unit,
        key=key,
        line=wording.unit_line(unit).removeprefix("PASS: "),
        css=_CLASSES[unit.verdict],
        is_full=is_full,
        findings=findings[:_MOST_FINDINGS],
        more_findings=max(0, len(findings) - _MOST_FINDINGS),
        axis=svg(error_axis(scale)) if has_numbers else None,
        tensors=tensors,
        more_tensors=len(ranked) - len(shown),
        evidence=_evidence(unit, differing) if is_full else [],
        graphs=[
            (_caption(part.alike, part.omitted, part.inside), svg(graph_picture(part, f"{key}-{number}")))
            for number, part in enumerate(parts)
        ],
    )


def _caption(alike: int, omitted: int, inside: str | None) -> str:
    text = f"one of {alike} parts that differ in this way" if alike > 1 else "a part that differs"
    text += f", in {inside}" if inside else ""
    return f"{text}; {wording.counted(omitted, 'more changed node')} not drawn" if omitted else text


def _part_of_tolerance(tensor: TensorResult) -> float:
    error, budget = finite(tensor.error), finite(tensor.budget)
    return error / budget if error and budget else 0.0


def _evidence(unit: Unit, differing: Sequence[TensorResult]) -> list[_Evidence]:
    """Return the figures and elements of the worst tensors that have some."""
    found: list[_Evidence] = []
    for tensor in differing:
        drawings = [step_chart(tensor.ladder, unit.form, tensor.tensor)] if tensor.ladder is not None else []
        drawings += [each for each in [heat_map(tensor)] if each is not None]
        if (drawings or tensor.worst) and len(found) < _MOST_EVIDENCE:
            found.append(_Evidence(tensor, list(map(svg, drawings)), *wording.element_table(unit, tensor)))
    return found
