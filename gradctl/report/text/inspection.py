"""An inspection on a screen, as JSON, and the few lines of it that ``gradctl trace`` prints."""

from __future__ import annotations

import io
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.padding import Padding

from gradctl.core.inspection import Inspection, ParameterRow, Semantic
from gradctl.report.text.matrix import data, plain_table
from gradctl.report.text.wording import counted

# A screen is read: what goes beyond these is counted, and stands in --format json.
_MOST_ROWS = 40
_MOST_OPERATORS = 12


def render_json(inspection: Inspection) -> str:
    """Return the inspection as indented JSON, its keys in the order of ``Inspection``."""
    return msgspec.json.format(msgspec.json.encode(inspection), indent=2).decode() + "\n"


def render(inspection: Inspection, *, width: int = 80) -> str:
    """Return the inspection for a screen: tensors, then operators, and last what affects the gradients."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, markup=False, highlight=False, emoji=False, color_system=None)
    ports = [("input", port) for port in inspection.inputs] + [("output", port) for port in inspection.outputs]
    _print_rows(console, ("", "name", "type"), [(what, port.name or "-", port.type) for what, port in ports])
    parameters = [(row.name, _typed(row.dtype, row.shape), _marks(row)) for row in inspection.parameters]
    _print_rows(console, ("parameter", "type", ""), parameters)
    buffers = [
        (row.name, _typed(row.dtype, row.shape), "changes in a call" if row.changes else "")
        for row in inspection.buffers
    ]
    _print_rows(console, ("buffer", "type", ""), buffers)
    for line in summary(inspection):
        _print(console, line)
    if inspection.source == "program":
        _print_semantics(console, inspection.semantics)
    for note in inspection.notes:
        _print(console, f"note {note}")
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


def summary(inspection: Inspection) -> list[str]:
    """Return the lines that say what a graph consists of: sizes, operators by count, opsets, guards."""
    tensors = f"{counted(len(inspection.parameters), 'parameter')}, {counted(inspection.elements, 'element')}"
    lines = [f"{tensors}; {counted(len(inspection.buffers), 'buffer')}; {_size(inspection.bytes)}"]
    if inspection.operators:
        shown = [f"{name} {count}" for name, count in list(inspection.operators.items())[:_MOST_OPERATORS]]
        more = len(inspection.operators) - len(shown)
        rest = f" and {more} more" if more > 0 else ""
        total = counted(sum(inspection.operators.values()), "operator")
        lines.append(f"{total}: {', '.join(shown)}{rest}")
    if inspection.opsets:
        lines.append("opset: " + ", ".join(f"{name} {version}" for name, version in inspection.opsets.items()))
    if inspection.source == "onnx":
        lines += [f"{each.name} is to be drawn: {each.message}" for each in inspection.semantics[:_MOST_OPERATORS]]
        more = len(inspection.semantics) - _MOST_OPERATORS
        lines += [f"and {more} more inputs are"] if more > 0 else []
    if inspection.source == "export":
        lines.append(f"guards: {'; '.join(inspection.guards) or 'none, every size is fixed'}")
    return lines


def _print_semantics(console: Console, semantics: Sequence[Semantic]) -> None:
    if not semantics:
        _print(console, "no custom Function, hook, cut, random number or branch on data")
        return
    _print(console, "")
    for each in semantics[:_MOST_ROWS]:
        place = f" ({each.location})" if each.location is not None and str(each.location) else ""
        times = f" {each.count} times" if each.count > 1 else ""
        _print(console, f"{each.kind}: {each.name}{times}{place}")
        console.print(Padding(data(each.message), (0, 0, 0, 2)))
    _print_more(console, len(semantics) - _MOST_ROWS)


def _print_rows(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = plain_table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows[:_MOST_ROWS]:
        table.add_row(*map(data, row))
    console.print(table)
    _print_more(console, len(rows) - _MOST_ROWS)
    console.print()


def _print_more(console: Console, count: int) -> None:
    if count > 0:
        _print(console, f"and {count} more (--format json has them all)")


def _print(console: Console, text: str) -> None:
    console.print(data(text))


def _typed(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _marks(row: ParameterRow) -> str:
    marks = [f"tied with {', '.join(row.tied)}"] if row.tied else []
    marks += ["frozen"] if row.frozen else []
    return ", ".join(marks + (["unused (no gradient)"] if row.unused else []))


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return counted(count, "byte")
