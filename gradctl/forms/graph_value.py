"""The values of a static form's graph in order, with their inputs and source locations."""

from __future__ import annotations

from dataclasses import dataclass

from gradctl.forms.source_location import SourceLocation
from gradctl.numerics.sketch import Sketch


@dataclass(slots=True, eq=False)
class GraphValue:
    """One value that a graph computes, or an input of it."""

    name: str  # in the graph
    place: SourceLocation | None  # of the node that computes it; None for an input, a parameter or a constant
    inputs: tuple[str, ...] = ()  # names of the inputs of the node
    sketch: Sketch | None = None  # of the value; None if it is not a tensor
    requires_grad: bool = False
    adjoint: Sketch | None = None  # sketch of its gradient; None if it has none
    leaf: str | None = None  # its name, if it is one


@dataclass(frozen=True, slots=True, eq=False)
class GraphRun:
    """The values of one run in topological order, and the names of the graph's outputs."""

    values: tuple[GraphValue, ...]
    outputs: tuple[str, ...]


class NoGraph(Exception):
    """The inner values of this form are not accessible: it is opaque, or has no graph that can be read here."""
