"""Dynamo's own account of a model: where its graph breaks, and what was compiled again, and why."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradctl.forms.silence import silenced
from gradctl.forms.source_location import line_in
from gradctl.subject.frames import is_users
from gradctl.subject.instance import Instance
from gradctl.subject.torch_private import clear_compilation_metrics, compilation_metrics, explain_dynamo

# The line of code whose guard fails, as Dynamo prints it; the path is cut at its beginning.
_GUARDED = re.compile(r"#\s*\S*?(?P<name>[^/\\\s]+\.py):(?P<line>\d+) in ")


@dataclass(frozen=True, slots=True)
class Event:
    """A graph break or a recompilation: Dynamo's reason in one line, and file and line in the user's program.

    ``is_refused``: there were too many, and Dynamo runs the function as eager from then on.
    """

    reason: str
    place: tuple[str, int] | None
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class GraphBreaks:
    """Where Dynamo ends a graph or leaves a function to Python, and the number of operators in all graphs."""

    breaks: tuple[Event, ...]
    operators: int


def graph_breaks(instance: Instance) -> GraphBreaks:
    """Return what ``torch._dynamo.explain`` says of one call of a model; what Dynamo compiled before is dropped.

    Raises:
        Exception: whatever the model, or Dynamo, raises.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    clear_compilation_metrics()
    with silenced():
        explained = explain_dynamo(instance.model)(*args, **kwargs)
    reasons = (each for each in explained.break_reasons if each.graph_break)
    breaks = [_event(each.reason, "".join(traceback.format_list(each.user_stack))) for each in reasons]
    # A break in a loop leaves the whole function to Python: then there is no graph that ends in it.
    breaks += [_at_frame(each.fail_reason, each) for each in compilation_metrics() if each.co_name and each.fail_reason]
    nodes = (node for graph in explained.graphs for node in graph.graph.nodes)
    return GraphBreaks(tuple(dict.fromkeys(breaks)), sum(node.op.startswith("call_") for node in nodes))


def recompilations() -> list[Event]:
    """Return what was compiled again, in order, since ``clear_compilation_metrics``.

    Frames that continue a function after a graph break are compiled again with it, and are not counted.
    """
    return [
        replace(_at_frame(each.recompile_reason, each), is_refused=each.fail_reason is not None)
        for each in compilation_metrics()
        if each.recompile_reason and not (each.co_name or "").startswith("torch_dynamo_resume_in_")
    ]


def _event(reason: str, stack: str) -> Event:
    return Event(_first_line(reason), line_in(stack))


def _at_frame(reason: str, metrics: Any) -> Event:
    """Return an event at the line that its reason names, or where the function that was compiled begins."""
    place = line_in(reason)
    if place is None and metrics.fail_user_frame_lineno is not None:
        place = metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno
    guarded = _GUARDED.search(reason)
    file = metrics.co_filename or "<unknown>"
    if place is None and guarded is not None and guarded["name"] == Path(file).name:
        place = file, int(guarded["line"])
    if place is None and is_users(file):
        place = file, metrics.co_firstlineno
    return Event(_first_line(reason), place)


def _first_line(reason: str) -> str:
    """Return the first line of a reason without the code of its guard, and the number of the version that it is of."""
    line = next(iter(reason.strip().splitlines()), "")
    return " ".join(re.sub(r"^\d+/\d+: ", "", line).partition("  # ")[0].split()).rstrip(".")
