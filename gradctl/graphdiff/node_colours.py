"""Colours of nodes: one of their computation, and one of the use of their result.

The first depends on operator, attributes, and the colours of the inputs; the second on the operators that use the
result, and on their users, down to the outputs. A colour is a number, unique for both graphs.

Source: colour refinement as Weisfeiler and Lehman, Nauchno-Technicheskaya Informatsia 2 (1968), on directed graphs with
ordered edges, where a pass in each direction is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from gradctl.graphdiff.graph_view import (
    Consumer,
    Graph,
    GraphView,
    Source,
    attributes_of,
    default_of,
    operator_of,
    subgraphs,
)

_Key = Hashable
_Outer = Callable[[str], Hashable]


@dataclass(slots=True, eq=False)
class Side:
    """One graph of the two.

    Attributes:
        view: the graph.
        opsets: the version of each operator set.
        outer: identifies a value from around the graph; equal for values that are the same in both graphs.
        inputs: the position in the first graph of each input.
        outputs: the position in the first graph of each output.
        attributes: text and identity of each attribute, by node.
        computed: the exact colour of the computation of each node.
    """

    view: GraphView
    opsets: Mapping[str, int]
    outer: _Outer
    inputs: Sequence[int]
    outputs: Sequence[int]
    attributes: list[dict[str, tuple[str, Any]]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attributes = [attributes_of(node, self._opset(node), self.view.folder) for node in self.view.nodes]

    def attribute(self, place: int, name: str) -> str | None:
        """Return the text of an attribute of a node, or of its default value."""
        if name in self.attributes[place]:
            return self.attributes[place][name][0]
        node = self.view.nodes[place]
        return default_of(node, self._opset(node), name)

    def identities(self, place: int) -> dict[str, Any]:
        """Return the identity of each attribute of a node, by name."""
        return {name: identity for name, (_, identity) in self.attributes[place].items()}

    def constants(self, place: int) -> tuple[tuple[int, bytes], ...]:
        """Return the digest of each constant input of a node."""
        return tuple(
            (slot, self.view.constants[source.place].digest)
            for slot, source in enumerate(self.view.inputs[place])
            if source.kind == "constant"
        )

    def _opset(self, node: onnx.NodeProto) -> int:
        return self.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1)


def make_side(graph: Graph, folder: Path, opsets: Mapping[str, int], outer: _Outer) -> Side:
    """Return a graph whose inputs and outputs have the positions of the first graph."""
    view = GraphView(graph, folder)
    return Side(view, opsets, outer, range(len(view.input_names)), range(len(view.outputs)))


class Palette:
    """Numbers for colours, the same for both graphs."""

    def __init__(self) -> None:
        self._known: dict[_Key, int] = {}

    def __call__(self, key: _Key) -> int:
        """Return the number of a colour."""
        return self._known.setdefault(key, len(self._known))


def colour_computations(side: Side, palette: Palette, *, exact: bool) -> list[int]:
    """Return the colour of the computation of each node; without constants and attributes if not ``exact``."""
    colours: list[int] = []
    for place, node in enumerate(side.view.nodes):
        given = [_source_colour(side, source, colours, exact=exact) for source in side.view.inputs[place]]
        own = _own_colour(side, place, palette, colours) if exact else operator_of(node)
        colours.append(palette(("computed", exact, own, tuple(given if exact else filter(None, given)))))
    return colours


def _source_colour(side: Side, source: Source, colours: Sequence[int], *, exact: bool) -> _Key:
    if source.kind == "node":
        return "node", colours[source.place], source.slot
    if source.kind == "constant":
        return ("constant", side.view.constants[source.place].digest) if exact else None
    if source.kind == "input":
        return "input", side.inputs[source.place]
    return ("outer", side.outer(str(source.of))) if source.kind == "outer" else ("none",)


def _own_colour(side: Side, place: int, palette: Palette, colours: Sequence[int] | None) -> _Key:
    """Return operator, attributes and subgraphs, of which outer values are ignored if there are no colours.

    The colour of a subgraph is that of its outputs.
    """
    node = side.view.nodes[place]
    values = tuple(side.identities(place).items())

    def outer(name: str) -> Hashable:
        if colours is None:
            return None
        source = side.view.source(name)
        return side.outer(name) if source.kind == "outer" else _source_colour(side, source, colours, exact=True)

    inner = tuple((name, _graph_colour(graph, side, outer, palette)) for name, graph in subgraphs(node))
    return operator_of(node), values, inner


def _graph_colour(graph: onnx.GraphProto, around: Side, outer: _Outer, palette: Palette) -> int:
    side = make_side(graph, around.view.folder, around.opsets, outer)
    view = side.view
    colours = colour_computations(side, palette, exact=True)
    outputs = tuple(_source_colour(side, source, colours, exact=True) for source in view.outputs)
    return palette(("graph", len(view.input_names), outputs))


def colour_uses(side: Side, palette: Palette, *, exact: bool) -> list[int]:
    """Return the colour of the use of each node's outputs, including its own operator."""
    view = side.view
    colours = [0] * len(view.nodes)

    def consumer(each: Consumer) -> tuple[int, int, int]:
        if each.node < 0:
            return each.output, -1, side.outputs[each.slot]
        return each.output, colours[each.node], each.slot

    for place in reversed(range(len(view.nodes))):
        own: _Key = operator_of(view.nodes[place])
        if exact:
            own = _own_colour(side, place, palette, None), side.constants(place)
        consumers = tuple(sorted(consumer(each) for each in view.consumers[place]))
        colours[place] = palette(("used", exact, own, consumers))
    return colours
