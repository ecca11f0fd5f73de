"""The report in Markdown, for a comment on a pull request or the page of a CI step."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradctl.core.findings import Finding, Report, TensorResult, Unit, format_number
from gradctl.core.optimization import Optimization
from gradctl.report.optimization import PASS_HEADINGS, SIZE_HEADINGS, notes, pass_rows, size_rows
from gradctl.report.wording import (
    VERDICT_WORDS,
    differing,
    one_line,
    shape_and_dtype,
    unit_line,
    verdict_line,
    worst_first,
)

__all__ = ["render"]


def render(report: Report) -> str:
    """Return the report in Markdown: the verdict first, then each unit with what differs and what was found."""
    lines = [f"## gradctl {_escaped(report.command)}: {report.verdict}", "", _escaped(verdict_line(report)), ""]
    for unit in report.units:
        lines += _unit(unit)
    tool = f"{report.tool.name} {report.tool.version}"
    lines.append(f"<sub>{_escaped(tool)}, seed {report.seed}</sub>")
    return "\n".join(lines) + "\n"


def _unit(unit: Unit) -> list[str]:
    lines = [f"### {_code(unit.target)}, {_code(unit.form)}: {unit.verdict}", "", _escaped(unit_line(unit)), ""]
    if unit.optimization is not None:
        lines += _optimization(unit.optimization)
    if loud := differing(unit.tensors):
        lines += ["| tensor | type | verdict | error | budget | elements wrong |", "|---|---|---|---:|---:|---:|"]
        lines += [_row(tensor) for tensor in loud]
        lines.append("")
    if unit.findings:
        lines += [_finding(finding) for finding in worst_first(unit.findings)]
        lines.append("")
    return lines


def _optimization(optimization: Optimization) -> list[str]:
    lines = [*_table(PASS_HEADINGS, pass_rows(optimization), left=2), ""]
    lines += [f"- {_escaped(line)}" for line in notes(optimization)]
    return [*lines, "", *_table(SIZE_HEADINGS, size_rows(optimization), left=1), ""]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table whose first columns stand to the left."""
    ruler = "".join("---|" if number < left else "---:|" for number in range(len(headings)))
    cells = [" | ".join(_escaped(cell) for cell in row) for row in (headings, *rows)]
    return [f"| {cells[0]} |", f"|{ruler}", *(f"| {row} |" for row in cells[1:])]


def _row(tensor: TensorResult) -> str:
    numbers = format_number(tensor.error), format_number(tensor.budget)
    wrong = "-" if tensor.elements_wrong is None else str(tensor.elements_wrong)
    name, kind = _code(tensor.tensor), _code(shape_and_dtype(tensor))
    cells = (name.replace("|", "\\|"), kind.replace("|", "\\|"), VERDICT_WORDS[tensor.verdict], *numbers, wrong)
    return f"| {' | '.join(cells)} |"


def _finding(finding: Finding) -> str:
    word = "allowed" if finding.allowed else finding.severity
    text = f"- **{word} {finding.code}** {_escaped(finding.message)}"
    if finding.location is not None and str(finding.location):
        text += f" ({_code(str(finding.location))})"
    if finding.allow and not finding.allowed:
        text += f"; if it is meant: {_code(f'--allow {finding.allow}')}"
    return text + (f"; {_escaped(finding.hint)}" if finding.hint and finding.severity != "note" else "")


def _code(text: str) -> str:
    """Return ``text`` as a code span, fenced by more backticks than it holds."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest or not text else f"{fence}{text}{fence}"


def _escaped(text: str) -> str:
    """Return ``text`` as prose in which nothing is markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~@&])", r"\\\1", one_line(text))
