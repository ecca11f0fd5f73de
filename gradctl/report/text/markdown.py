"""The report in Markdown, for a comment on a pull request or the page of a CI step."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradctl.core.findings import Finding, Report, TensorResult, Unit
from gradctl.core.numbers import format_number
from gradctl.report.text.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.text.structure import structure_lines
from gradctl.report.text.wording import (
    counted,
    differing_tensors,
    is_as_expected,
    not_judged,
    one_line,
    shape_and_dtype,
    skip_lines,
    tensor_words,
    unit_line,
    verdict_line,
    verdict_word,
    worst_first,
    worst_units_first,
)


def render(report: Report) -> str:
    """Return the report in Markdown: the verdict first, then each unit with what differs and what was found.

    Of several targets a table of what each form did comes before them; units that pass are folded at the end.
    """
    return "".join(parts(report))


def parts(report: Report) -> list[str]:
    """Return the report in parts that are whole by themselves, what matters most first: a head, units, a foot."""
    title = report.status if report.status == "interrupted" else report.verdict
    head = [f"## gradctl {_escaped(report.command)}: {title}", "", _escaped(verdict_line(report)), ""]
    units = list(report.units)
    folded: list[str] = []
    if len({unit.target for unit in units}) > 1:
        head += [*_targets(units), ""]
        skipped = [f"- {_escaped(line)}" for line in skip_lines(units)]
        head += [*skipped, ""] if skipped else []
        folded = _folded([unit for unit in units if unit.verdict == "pass"])
        units = [unit for unit in worst_units_first(units) if unit.verdict in ("fail", "inconclusive")]
    tool = f"{report.tool.name} {report.tool.version}"
    foot = [f"<sub>{_escaped(tool)}, seed {report.seed}</sub>"]
    return ["\n".join([*lines, ""]) for lines in (head, *map(_unit, units), folded, foot) if lines]


def _targets(units: Sequence[Unit]) -> list[str]:
    """Return the table of targets and forms, each cell what the form did."""
    forms = list(dict.fromkeys(unit.form for unit in units))
    done: dict[str, dict[str, list[str]]] = {}
    for unit in units:
        done.setdefault(unit.target, {}).setdefault(unit.form, []).append(verdict_word(unit))
    lines = [f"| {' | '.join(['target', *map(_cell_code, forms)])} |", "|---" * (len(forms) + 1) + "|"]
    for target, by_form in done.items():
        cells = [_cell_code(target), *(", ".join(by_form.get(form, ["-"])) for form in forms)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _folded(units: Sequence[Unit]) -> list[str]:
    """Return what was found in units that pass, folded."""
    lines = []
    for unit in units:
        place = f"{_code(unit.target)}, {_code(unit.form)}"
        lines += [f"- {place}: {_escaped(unit_line(unit))}"] if is_as_expected(unit) else []
        lines += [f"- {place}: {_finding(finding).removeprefix('- ')}" for finding in worst_first(unit.findings)]
    if not lines:
        return []
    summary = f"{counted(len(lines), 'line')} about units that pass"
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def _unit(unit: Unit) -> list[str]:
    lines = [f"### {_code(unit.target)}, {_code(unit.form)}: {unit.verdict}", "", _escaped(unit_line(unit)), ""]
    if unit.optimization is not None:
        if rows := pass_rows(unit.optimization):
            lines += [*_table(PASS_HEADINGS, rows, left=2), ""]
        lines += [f"- {_escaped(line)}" for line in notes(unit.optimization)]
        lines += ["", *_table(SIZE_HEADINGS, size_rows(unit.optimization), left=1), ""]
    if unit.structure is not None:
        headline, *changes = structure_lines(unit.structure)
        lines += [_escaped(headline), "", *(f"- {_escaped(change.strip())}" for change in changes)]
        lines += [""] if changes else []
    if loud := differing_tensors(unit.tensors):
        lines += ["| tensor | type | verdict | error | budget | elements wrong |", "|---|---|---|---:|---:|---:|"]
        lines += [_row(unit, tensor) for tensor in loud]
        lines.append("")
    said = [_finding(finding) for finding in worst_first(unit.findings)]
    said += [f"- {_escaped(line)}" for line in not_judged(unit.tensors)]
    lines += [*said, ""] if said else []
    return lines


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table whose first columns stand to the left."""
    ruler = "".join("---|" if number < left else "---:|" for number in range(len(headings)))
    cells = [" | ".join(_escaped(cell) for cell in row) for row in (headings, *rows)]
    return [f"| {cells[0]} |", f"|{ruler}", *(f"| {row} |" for row in cells[1:])]


def _row(unit: Unit, tensor: TensorResult) -> str:
    numbers = format_number(tensor.error), format_number(tensor.budget)
    wrong = "-" if tensor.elements_wrong is None else str(tensor.elements_wrong)
    name, kind = _cell_code(tensor.tensor), _cell_code(shape_and_dtype(tensor))
    cells = (name, kind, tensor_words(unit)[tensor.verdict], *numbers, wrong)
    return f"| {' | '.join(cells)} |"


def _finding(finding: Finding) -> str:
    word = "allowed" if finding.allowed else finding.severity
    text = f"- **{word} {finding.code}** {_escaped(finding.message)}"
    if finding.location is not None and str(finding.location):
        text += f" ({_code(str(finding.location))})"
    if finding.allow and not finding.allowed:
        text += f"; if it is meant: {_code(f'--allow {finding.allow}')}"
    return text + (f"; {_escaped(finding.hint)}" if finding.hint and finding.severity != "note" else "")


def _cell_code(text: str) -> str:
    return _code(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Return ``text`` as a code span, fenced by more backticks than it holds."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest or not text else f"{fence}{text}{fence}"


def _escaped(text: str) -> str:
    """Return ``text`` as prose in which nothing is markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~@&])", r"\\\1", one_line(text))
