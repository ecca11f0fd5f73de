"""The values of a static form's graph in order, with their inputs and source locations."""

from __future__ import annotations

from dataclasses import dataclass

from gradctl.forms.source_location import SourceLocation
from gradctl.numerics.sketch import Sketch


@dataclass(slots=True, eq=False)
class GraphValue:
    """One value that a graph computes, or an input of it.

    Attributes:
        name: in the graph.
        place: the location of the node that computes it; None for an input, a parameter or a constant.
        inputs: names of the inputs of the node.
        sketch: of the value; None if it is not a tensor.
        requires_grad: whether it requires a gradient.
        adjoint: sketch of its gradient; None if it has none.
        leaf: its name, if it is one.
    """

    name: str
    place: SourceLocation | None
    inputs: tuple[str, ...] = ()
    sketch: Sketch | None = None
    requires_grad: bool = False
    adjoint: Sketch | None = None
    leaf: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GraphRun:
    """The values of one run in topological order, and the names of the graph's outputs."""

    values: tuple[GraphValue, ...]
    outputs: tuple[str, ...]


class NoGraph(Exception):
    """The inner values of this form are not accessible: it is opaque, or has no graph that can be read here."""
