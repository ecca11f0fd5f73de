"""The figures of a report by name, as ``--plot`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gradctl.core.findings import Report, Unit
from gradctl.core.names import NOT_JUDGED
from gradctl.report.figures.drawing import Drawing
from gradctl.report.figures.error_strips import error_chart
from gradctl.report.figures.graph_picture import graph_picture
from gradctl.report.figures.heat_map import heat_map
from gradctl.report.figures.step_chart import step_chart
from gradctl.report.figures.timing_bars import call_bars, pass_bars, unit_bars
from gradctl.report.figures.verdict_matrix import verdict_matrix
from gradctl.report.text.wording import differing_tensors, worst_units_first

# What a person looks at: the HTML report has more.
_MOST_UNITS = 12
_MOST_TENSORS = 24
_MOST_EVIDENCE = 3


def all_figures(report: Report) -> dict[str, Drawing]:
    """Return the figures by name, which is a file name without a suffix: those of the run, then of its worst units."""
    units = worst_units_first(report.units)
    found: list[tuple[str, Drawing | None]] = [
        ("matrix", verdict_matrix(report.units)),
        ("time", unit_bars(units)),
        ("calls", call_bars(report.units)),
    ]
    for number, unit in enumerate(units[:_MOST_UNITS], 1):
        found += ((_file_name(f"{number}-{unit.form}-{name}"), drawing) for name, drawing in _of_unit(unit))
    return {name: drawing for name, drawing in found if drawing is not None}


def _of_unit(unit: Unit) -> Iterator[tuple[str, Drawing | None]]:
    differing = differing_tensors(unit.tensors)
    others = [each for each in unit.tensors if each not in differing and each.verdict not in NOT_JUDGED]
    shown = [each for each in (*differing, *others) if each.error is not None][:_MOST_TENSORS]
    if shown:
        yield "errors", error_chart("relative errors and tolerances", shown)
    for tensor in differing[:_MOST_EVIDENCE]:
        if tensor.ladder is not None:
            yield f"steps-{tensor.tensor}", step_chart(tensor.ladder, unit.form, tensor.tensor)
        yield f"map-{tensor.tensor}", heat_map(tensor)
    if unit.optimization is not None:
        yield "passes", pass_bars(unit.optimization)
    parts = unit.structure.parts if unit.structure else unit.optimization.parts if unit.optimization else ()
    for number, part in enumerate(parts, 1):
        yield f"graph-{number}", graph_picture(part, "")


def _file_name(text: str) -> str:
    """Return a text as a part of a path on any file system."""
    return re.sub(r"[^\w.=-]+", "-", text, flags=re.ASCII)[:100]
