"""The result of ``gradctl optimize``, as rows of tables for screen and Markdown."""

from __future__ import annotations

from gradctl.core.numbers import format_number
from gradctl.core.optimization import GraphSize, Latency, Optimization, PassOutcome

PASS_HEADINGS = ("pass", "result", "nodes", "error", "budget", "latency", "time")
SIZE_HEADINGS = ("", "before", "after")


# Passes with these results have no row in the table.
_WITHOUT_ROW = ("unchanged", "not installed", "not applicable")


def pass_rows(optimization: Optimization) -> list[tuple[str, ...]]:
    """Return a row for each pass that changed the graph or failed: result, nodes and latency after it, its own time."""
    return [
        (
            each.name,
            each.status,
            str(each.size.nodes) if each.size is not None else "-",
            format_number(each.error),
            format_number(each.budget),
            format_seconds(each.latency.median) if each.latency is not None else "-",
            format_seconds(each.seconds),
        )
        for each in optimization.passes
        if each.status not in _WITHOUT_ROW
    ]


def size_rows(optimization: Optimization) -> list[tuple[str, ...]]:
    """Return what the graph consists of and takes, before and after; operators last, those that differ in number."""
    before, after = optimization.before, optimization.after
    latencies = optimization.latency_before, optimization.latency_after
    rows: list[tuple[str, ...]] = [
        ("nodes", str(before.nodes), str(after.nodes)),
        ("initializers", str(before.initializers), str(after.initializers)),
        ("parameters", str(before.parameters), str(after.parameters)),
        ("bytes", str(before.bytes), str(after.bytes)),
        ("FLOPs (estimate)", _estimate(before, before.flops), _estimate(after, after.flops)),
        (
            "activation bytes (estimate)",
            _estimate(before, before.activation_bytes),
            _estimate(after, after.activation_bytes),
        ),
        ("latency (median)", *(format_seconds(each.median) if each else "-" for each in latencies)),
        ("latency (quartiles)", *(_quartiles(each) if each else "-" for each in latencies)),
    ]
    for kind in sorted({*before.operators, *after.operators}):
        counts = before.operators.get(kind, 0), after.operators.get(kind, 0)
        if counts[0] != counts[1]:
            rows.append((kind, str(counts[0]), str(counts[1])))
    return rows


def notes(optimization: Optimization) -> list[str]:
    """Return a line for all passes that changed nothing, one for each other pass, and one for the total error."""
    unchanged = [each.name for each in optimization.passes if each.status == "unchanged"]
    lines = [f"no change: {', '.join(unchanged)}"] if unchanged else []
    lines += [f"{each.name}: {_said(each)}" for each in optimization.passes if _said(each)]
    if optimization.error is not None:
        lines.append(
            f"error of all passes together {format_number(optimization.error)}, budget "
            f"{format_number(optimization.budget)}"
        )
    if optimization.tied_to_machine:
        tied = ", ".join(each.name for each in optimization.passes if each.tied_to_machine)
        lines.append(f"tied to this machine by {tied}: optimise it again on the machine that runs it")
    return lines


def _said(outcome: PassOutcome) -> str:
    if outcome.status in ("undone", "failed"):  # there is a finding that says it
        return ""
    if outcome.reason is not None:
        return outcome.reason
    return outcome.changed


def _estimate(size: GraphSize, value: int) -> str:
    return f"{value}" + (f" without {size.uncounted} nodes" if size.uncounted else "")


def _quartiles(latency: Latency) -> str:
    return f"{format_seconds(latency.lower_quartile)}, {format_seconds(latency.upper_quartile)}"


def format_seconds(seconds: float) -> str:
    """Return a time with three significant digits, in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
