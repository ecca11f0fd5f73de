"""Colours of nodes: one of their computation, and one of the use of their result.

The first depends on operator, attributes, and the colours of the inputs; the second on the operators that use the
result, and on their users, down to the outputs. A colour is a number, unique for both graphs.

Source: colour refinement as Weisfeiler and Lehman, Nauchno-Technicheskaya Informatsia 2 (1968), on directed graphs with
ordered edges, where a pass in each direction is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from gradctl.graphdiff.graph_view import (
    Consumer,
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
        inputs, outputs: the position in the first graph of each input and output; by default, its own.
        attributes: text and identity of each attribute, by node.
        computed: the exact colour of the computation of each node.
        counterparts: the positions of nodes of the other graph by those of matched nodes.
    """

    view: GraphView
    opsets: Mapping[str, int]
    outer: _Outer
    inputs: Sequence[int] = field(init=False)
    outputs: Sequence[int] = field(init=False)
    attributes: list[dict[str, tuple[str, Any]]] = field(init=False)
    computed: list[int] = field(default_factory=list)
    counterparts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs, self.outputs = range(len(self.view.input_names)), range(len(self.view.outputs))
        self.attributes = [attributes_of(node, self._opset(node), self.view.folder) for node in self.view.nodes]

    def subgraph(self, graph: onnx.GraphProto, outer: _Outer) -> Side:
        """Return a subgraph of one of the nodes."""
        return Side(GraphView(graph, self.view.folder), self.opsets, outer)

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

    def identity(self, source: Source, nodes: Sequence[Hashable]) -> Hashable:
        """Return the identity of a source, which is equal for sources that are the same in both graphs.

        Args:
            source: of a value.
            nodes: the identity of each node.
        """
        match source.kind:
            case "node":
                return "node", nodes[source.place], source.slot
            case "constant":
                return "constant", self.view.constants[source.place].digest
            case "input":
                return "input", self.inputs[source.place]
            case "outer":
                return "outer", self.outer(str(source.of))
        return ("none",)

    def unmatched(self) -> list[int]:
        """Return the nodes without a counterpart."""
        return [place for place in range(len(self.view.nodes)) if place not in self.counterparts]

    def is_unmatched(self, source: Source) -> bool:
        """Return whether a source is a node without a counterpart."""
        return source.kind == "node" and source.of not in self.counterparts

    def _opset(self, node: onnx.NodeProto) -> int:
        return self.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1)


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
        sources = (source for source in side.view.inputs[place] if exact or source.kind != "constant")
        own = _own_colour(side, place, palette, colours) if exact else operator_of(node)
        colours.append(palette(("computed", exact, own, tuple(side.identity(each, colours) for each in sources))))
    return colours


def _own_colour(side: Side, place: int, palette: Palette, colours: Sequence[int] | None) -> _Key:
    """Return operator, attributes and subgraphs, of which outer values are ignored if there are no colours.

    The colour of a subgraph is that of its outputs.
    """
    node = side.view.nodes[place]
    values = tuple(side.identities(place).items())

    def outer(name: str) -> Hashable:
        return None if colours is None else side.identity(side.view.source(name), colours)

    inner = tuple((name, _graph_colour(graph, side, outer, palette)) for name, graph in subgraphs(node))
    return operator_of(node), values, inner


def _graph_colour(graph: onnx.GraphProto, around: Side, outer: _Outer, palette: Palette) -> int:
    side = around.subgraph(graph, outer)
    colours = colour_computations(side, palette, exact=True)
    outputs = tuple(side.identity(source, colours) for source in side.view.outputs)
    return palette(("graph", len(side.view.input_names), outputs))


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
