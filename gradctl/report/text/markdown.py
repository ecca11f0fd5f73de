"""The report in Markdown, for a comment on a pull request or the page of a CI step."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradctl.core.findings import Finding, Report, TensorResult, Unit
from gradctl.core.optimization import Optimization
from gradctl.report.text import wording
from gradctl.report.text.costs import NAMES, cost_legend, cost_table
from gradctl.report.text.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.text.shared_causes import findings_by_cause
from gradctl.report.text.structure import structure_lines


def render(report: Report) -> str:
    """Return the report in Markdown: the verdict first, then each unit with its differences and findings.

    Of several targets, a table of the result of each form comes before them; units that pass are folded at the end.
    """
    return "".join(parts(report))


def parts(report: Report) -> list[str]:
    """Return the report in parts of whole lines, the most important first: a head, units, a foot."""
    title = report.status if report.status == "interrupted" else report.verdict
    head = [f"## gradctl {_escaped(report.command)}: {title}", "", _escaped(wording.verdict_line(report)), ""]
    foot = [f"<sub>{_escaped(f'{report.tool.name} {report.tool.version}')}, seed {report.seed}</sub>"]
    if len({unit.target for unit in report.units}) > 1:
        table, sections = _of_targets(report.units)
    else:
        table, sections = _costs(report.units), [_unit(unit) for unit in report.units]
    return ["\n".join([*lines, ""]) for lines in ([*head, *table], *sections, foot)]


def _of_targets(units: Sequence[Unit]) -> tuple[list[str], list[list[str]]]:
    """Return the table of several targets, and the sections below it: units that do not pass, and the others folded."""
    skipped = [f"- {_escaped(line)}" for line in wording.skip_lines(units)]
    table = [*_targets(units), "", *skipped, *([""] if skipped else [])]
    worst = [_unit(unit) for unit in wording.worst_units_first(units) if unit.verdict in ("fail", "inconclusive")]
    folded = _folded([unit for unit in units if unit.verdict == "pass"])
    return table, [*worst, *([folded] if folded else [])]


def _targets(units: Sequence[Unit]) -> list[str]:
    forms = list(dict.fromkeys(unit.form for unit in units))
    done: dict[str, dict[str, list[str]]] = {}
    for unit in units:
        done.setdefault(unit.target, {}).setdefault(unit.form, []).append(wording.verdict_word(unit))
    lines = [f"| {' | '.join(['target', *map(_cell_code, forms)])} |", "|---" * (len(forms) + 1) + "|"]
    for target, by_form in done.items():
        cells = [_cell_code(target), *(", ".join(by_form.get(form, ["-"])) for form in forms)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _folded(units: Sequence[Unit]) -> list[str]:
    lines = []
    for unit in units:
        place = f"{_code(unit.target)}, {_code(unit.form)}"
        lines += [f"- {place}: {_escaped(wording.unit_line(unit))}"] if wording.is_as_expected(unit) else []
        lines += [
            f"- {place}: {_finding(finding).removeprefix('- ')}" for finding in wording.worst_first(unit.findings)
        ]
    if not lines:
        return []
    summary = f"{wording.counted(len(lines), 'line')} about units that pass"
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def _unit(unit: Unit) -> list[str]:
    lines = [f"### {_code(unit.target)}, {_code(unit.form)}: {unit.verdict}", "", _escaped(wording.unit_line(unit)), ""]
    if unit.optimization is not None:
        lines += _optimization(unit.optimization)
    if unit.structure is not None:
        headline, *changes = structure_lines(unit.structure)
        lines += [_escaped(headline), "", *_items(changes), *([""] if changes else [])]
    if different := wording.differing_tensors(unit.tensors):
        lines += [f"| {' | '.join([*wording.TENSOR_HEADINGS, 'wrong elements'])} |"]
        lines += ["|---|---|---|---:|---:|---:|", *(_row(unit, each) for each in different), ""]
    items = [*map(_finding, findings_by_cause(unit)), *_items(wording.not_judged(unit.tensors))]
    return [*lines, *items, *([""] if items else [])]


def _optimization(optimization: Optimization) -> list[str]:
    rows = pass_rows(optimization)
    lines = [*_table(PASS_HEADINGS, rows, left=2), ""] if rows else []
    lines += [*_items(notes(optimization)), ""]
    return [*lines, *_table(SIZE_HEADINGS, size_rows(optimization), left=1), ""]


def _costs(units: Sequence[Unit]) -> list[str]:
    """Return the table of ``bench``, or nothing."""
    if not any(unit.measurements for unit in units):
        return []
    headings, rows = cost_table(units)
    return [*_table([each.replace("\n", " ") for each in headings], rows, left=NAMES), "", cost_legend(units), ""]


def _items(texts: Sequence[str]) -> list[str]:
    return [f"- {_escaped(text.strip())}" for text in texts]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table whose first columns stand to the left."""
    ruler = "".join("---|" if number < left else "---:|" for number in range(len(headings)))
    cells = [" | ".join(_escaped(cell) for cell in row) for row in (headings, *rows)]
    return [f"| {cells[0]} |", f"|{ruler}", *(f"| {row} |" for row in cells[1:])]


def _row(unit: Unit, tensor: TensorResult) -> str:
    name, kind, *cells = wording.tensor_row(unit, tensor)
    wrong = "-" if tensor.elements_wrong is None else str(tensor.elements_wrong)
    return f"| {' | '.join([_cell_code(name), _cell_code(kind), *cells, wrong])} |"


def _finding(finding: Finding) -> str:
    text = f"- **{wording.severity_word(finding)} {finding.code}** {_escaped(finding.message)}"
    if location := wording.location_of(finding):
        text += f" ({_code(location)})"
    if finding.allow and not finding.allowed:
        text += f"; if this is intentional, add {_code(f'--allow {finding.allow}')}"
    return text + (f"; {_escaped(finding.hint)}" if finding.hint and finding.severity != "note" else "")


def _cell_code(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Return ``text`` as a code span, fenced by more backticks than it holds."""
    text = wording.one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest or not text else f"{fence}{text}{fence}"


def _escaped(text: str) -> str:
    """Return ``text`` as prose in which nothing is markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~@&])", r"\\\1", wording.one_line(text))
