"""How two graphs differ in what they consist of, as data: information beside the numbers, never a verdict."""

from __future__ import annotations

from typing import Literal

import msgspec

from gradctl.core.numbers import Number

ChangeKind = Literal[
    "fused", "split", "replaced", "folded", "merged", "removed", "added", "rewired", "attributes", "rewired, attributes"
]
InitializerKind = Literal["changed", "removed", "added"]


class GraphNode(msgspec.Struct, frozen=True, kw_only=True):
    """One node: its operator (``domain::Operator`` where it is not ONNX's own), its name, and the value it makes."""

    operator: str
    name: str
    value: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that has another value; null where one side does not have it."""

    what: str
    before: str | None
    after: str | None


class GraphChange(msgspec.Struct, frozen=True, kw_only=True):
    """One change of nodes. ``inside`` names the subgraph or function that it is in, null for the graph itself.

    ``fused``: one node of the second graph stands for several of the first; ``split``: several for one; ``replaced``:
    some for others.
    ``folded``: a constant stands for them; ``merged``: an equal node does. ``rewired``: the node takes other values;
    ``attributes``: it has others. ``differences`` are those of the last two.
    """

    kind: ChangeKind
    before: tuple[GraphNode, ...] = ()
    after: tuple[GraphNode, ...] = ()
    differences: tuple[Difference, ...] = ()
    inside: str | None = None


class DrawnNode(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a part of a graph that is drawn.

    ``attributes`` are those that differ from their defaults. ``inputs`` are the names of the values that it uses, and
    ``sources`` the drawn nodes that compute them, by position; null for another source. ``counterpart`` is the node of
    the other graph that it is matched with, by position. ``change`` is null for a node that did not change.
    """

    operator: str
    name: str
    value: str
    attributes: dict[str, str] = {}
    inputs: tuple[str, ...] = ()
    sources: tuple[int | None, ...] = ()
    counterpart: int | None = None
    change: ChangeKind | None = None


class GraphPart(msgspec.Struct, frozen=True, kw_only=True):
    """Changed nodes of two graphs that are connected, and the nodes next to them, to be drawn side by side.

    ``alike`` is how many parts of the graphs differ in the same way; one is drawn. ``omitted`` counts nodes of this
    part that are not drawn. ``inside`` is as in ``GraphChange``.
    """

    before: tuple[DrawnNode, ...] = ()
    after: tuple[DrawnNode, ...] = ()
    alike: int = 1
    omitted: int = 0
    inside: str | None = None


class InitializerChange(msgspec.Struct, frozen=True, kw_only=True):
    """One constant: initializer or Constant node.

    ``error`` is norm-relative, against the first file, ``max_abs`` the largest difference of an element; both null
    where type or shape differ. ``name_after`` is its name in the second file.
    """

    kind: InitializerKind
    name: str
    name_after: str | None = None
    type_before: str | None = None
    type_after: str | None = None
    error: Number = None
    max_abs: Number = None


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """All differences of two graphs.

    Nodes are counted without Identity and Constant, which compute nothing; ``operators_*`` has every node, those of
    subgraphs and functions too. ``renamed`` counts values of matched nodes with another name, ``moved`` constants that
    are the same under another name or in another place (initializer or node). ``omitted`` counts changes that the
    lists leave out. ``parts`` are for a drawing: of the first changes, one of each kind.
    """

    nodes_before: int
    nodes_after: int
    matched: int
    operators_before: dict[str, int] = {}
    operators_after: dict[str, int] = {}
    initializers_before: int = 0
    initializers_after: int = 0
    renamed: int = 0
    moved: int = 0
    changes: tuple[GraphChange, ...] = ()
    initializers: tuple[InitializerChange, ...] = ()
    model: tuple[Difference, ...] = ()
    omitted: int = 0
    parts: tuple[GraphPart, ...] = ()
