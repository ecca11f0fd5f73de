"""An inspection as text, as JSON, and the few lines of it that ``gradctl trace`` prints."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gradctl.core.inspection import Inspection, ParameterRow, Semantic
from gradctl.report.text.screen import Screen
from gradctl.report.text.wording import counted, location_of, shape_and_dtype

# What is beyond these is counted; --format json has it.
_MOST_ROWS = 40
_MOST_WORDS = 12


def render_json(inspection: Inspection) -> str:
    """Return the inspection as indented JSON, with the keys in the order of ``Inspection``."""
    return msgspec.json.format(msgspec.json.encode(inspection), indent=2).decode() + "\n"


def render(inspection: Inspection, *, width: int | None = None) -> str:
    """Return the inspection as text: tensors, then operators, and last what affects the gradients.

    ``width`` is that of the terminal, None for a pipe or a file.
    """
    screen = Screen(width)
    ports = [("input", port) for port in inspection.inputs] + [("output", port) for port in inspection.outputs]
    _print_rows(screen, ("", "name", "type"), [(kind, port.name or "-", port.type) for kind, port in ports])
    parameters = [(row.name, shape_and_dtype(row), _marks(row)) for row in inspection.parameters]
    _print_rows(screen, ("parameter", "type", ""), parameters)
    buffers = [(row.name, shape_and_dtype(row), "changes in a call" * bool(row.changes)) for row in inspection.buffers]
    _print_rows(screen, ("buffer", "type", ""), buffers)
    for line in summary(inspection):
        screen.paragraph(line)
    if inspection.source == "program":
        _print_semantics(screen, inspection.semantics)
    for note in inspection.notes:
        screen.paragraph(f"note {note}")
    return screen.text()


def summary(inspection: Inspection) -> list[str]:
    """Return lines with the sizes of a graph, its operators by count, opsets, random inputs and guards."""
    tensors = f"{counted(len(inspection.parameters), 'parameter')}, {counted(inspection.elements, 'element')}"
    lines = [f"{tensors}; {counted(len(inspection.buffers), 'buffer')}; {format_size(inspection.bytes)}"]
    if inspection.operators:
        total = counted(sum(inspection.operators.values()), "operator")
        lines.append(f"{total}: {_first([f'{name} {count}' for name, count in inspection.operators.items()], ', ')}")
    if inspection.opsets:
        lines.append("opset: " + ", ".join(f"{name} {version}" for name, version in inspection.opsets.items()))
    if inspection.source == "onnx" and inspection.semantics:
        lines.append(
            f"random inputs: {_first([f'{each.name} ({each.message})' for each in inspection.semantics], '; ')}"
        )
    if inspection.source == "export":
        lines.append(f"guards: {'; '.join(inspection.guards) or 'none, every size is fixed'}")
    return lines


def _first(texts: Sequence[str], separator: str) -> str:
    more = len(texts) - _MOST_WORDS
    return separator.join(texts[:_MOST_WORDS]) + (f" and {more} more" if more > 0 else "")


def _print_semantics(screen: Screen, semantics: Sequence[Semantic]) -> None:
    if not semantics:
        screen.paragraph("no custom Function, hook, detach, no_grad, random number or branch on data")
        return
    screen.line()
    for each in semantics[:_MOST_ROWS]:
        place = f" ({location_of(each)})" if location_of(each) else ""
        times = f" {each.count} times" if each.count > 1 else ""
        screen.paragraph(f"{each.kind}: {each.name}{times}{place}")
        screen.paragraph(each.message, indent=2)
    _print_more(screen, len(semantics) - _MOST_ROWS)


def _print_rows(screen: Screen, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    screen.table(headings, rows[:_MOST_ROWS])
    _print_more(screen, len(rows) - _MOST_ROWS)
    screen.line()


def _print_more(screen: Screen, count: int) -> None:
    if count > 0:
        screen.paragraph(f"and {count} more (--format json has them all)")


def _marks(row: ParameterRow) -> str:
    marks = [f"tied with {', '.join(row.tied)}"] if row.tied else []
    marks += ["frozen"] if row.frozen else []
    return ", ".join(marks + (["unused (no gradient)"] if row.unused else []))


def format_size(count: int) -> str:
    """Return bytes with three significant digits, in GB, MB or kB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return counted(count, "byte")
