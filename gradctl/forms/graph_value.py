"""What every static form's graph has in common: its values in order, who takes which, and where each comes from."""

from __future__ import annotations

from dataclasses import dataclass

from gradctl.forms.source_location import SourceLocation
from gradctl.numerics.sketch import Sketch

__all__ = ["GraphRun", "GraphValue", "NoGraph"]


@dataclass(slots=True, eq=False)
class GraphValue:
    """One value that a graph makes, or is given.

    Attributes:
        name: in the graph.
        place: the node that makes it; None for an input, a parameter or a constant.
        inputs: names of the values that the node takes.
        sketch: of the value; None where it is no tensor.
        requires_grad: whether it requires a gradient.
        adjoint: of the gradient that it got; None for none.
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
    """The values of one run in topological order, and which of them the graph gives out."""

    values: tuple[GraphValue, ...]
    outputs: tuple[str, ...]


class NoGraph(Exception):
    """The values inside of this form cannot be had: it is opaque, or of a kind that is not read here."""
