"""What two ONNX files consist of, held against each other: nodes, constants, inputs, outputs, opsets, metadata.

Subgraphs of matched nodes, and functions of one name, are compared in the same way. Not looked at: documentation,
names and metadata of nodes, notes of inner types (``value_info``), training information.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from gradctl.core.structure import Difference, GraphChange, GraphNode, InitializerChange, Structure
from gradctl.graphdiff.constant_matching import constant_changes, moved_constants, paired_constants
from gradctl.graphdiff.graph_changes import Changes, graph_node
from gradctl.graphdiff.graph_view import GraphView, Source, operators, shortened, subgraphs
from gradctl.graphdiff.node_colours import Side
from gradctl.graphdiff.node_matching import Matching, matching
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.session import port_text

_MOST_CHANGES = 1000  # of a kind of list in a report: 1000 take about 300 KiB of JSON


@dataclass(frozen=True, slots=True)
class SharedValue:
    """A value of the first graph, and the one of the second that stands for it, each with the node that makes it."""

    before: str
    after: str
    node_before: GraphNode
    node_after: GraphNode


@dataclass(frozen=True, slots=True)
class ComparedStructure:
    """How two files differ, and the values that they share, in the order of the first."""

    structure: Structure
    values: tuple[SharedValue, ...]


@dataclass(slots=True)
class _Found:
    """What has been found so far, in the graphs and all that is in them."""

    changes: list[GraphChange]
    initializers: list[InitializerChange]
    nodes_before: int = 0
    nodes_after: int = 0
    matched: int = 0
    renamed: int = 0
    moved: int = 0


def compare_structure(a: OnnxFile, b: OnnxFile) -> ComparedStructure:
    """Return how ``b`` differs from ``a``. External data are read, one pair of tensors at a time."""
    found = _Found([], [])
    sides = _sides(a, b)
    changes = _compare(*sides, None, found)
    _compare_functions(a, b, found)
    omitted = sum(max(0, len(each) - _MOST_CHANGES) for each in (found.changes, found.initializers))
    found.initializers.sort(key=_severity)
    structure = Structure(
        nodes_before=found.nodes_before,
        nodes_after=found.nodes_after,
        matched=found.matched,
        operators_before=operators(a.model),
        operators_after=operators(b.model),
        initializers_before=len(a.model.graph.initializer),
        initializers_after=len(b.model.graph.initializer),
        renamed=found.renamed,
        moved=found.moved,
        changes=tuple(found.changes[:_MOST_CHANGES]),
        initializers=tuple(found.initializers[:_MOST_CHANGES]),
        model=tuple(_model_differences(a, b)),
        omitted=omitted,
    )
    values = (_shared(sides[0].view, sides[1].view, mine, theirs) for mine, theirs in changes.values())
    return ComparedStructure(structure, tuple(values))


def _shared(a: GraphView, b: GraphView, mine: Source, theirs: Source) -> SharedValue:
    nodes = graph_node(a, int(mine.of)), graph_node(b, int(theirs.of))
    return SharedValue(a.name_of(mine), b.name_of(theirs), *nodes)


def _sides(a: OnnxFile, b: OnnxFile) -> tuple[Side, Side]:
    views = [GraphView(file.model.graph, file.path.parent) for file in (a, b)]
    names = [[each.name for each in file.model.graph.output] for file in (a, b)]
    inputs = _positions(views[0].input_names, views[1].input_names)
    outputs = _positions(names[0], names[1])
    opsets = [_opsets(file.model) for file in (a, b)]
    return (
        Side(views[0], opsets[0], _unknown, range(len(views[0].input_names)), range(len(names[0]))),
        Side(views[1], opsets[1], _unknown, inputs, outputs),
    )


def _positions(mine: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Return where the first graph has each port of the second: by name, or by order where as many are named other."""
    if len(mine) == len(theirs) and set(mine) != set(theirs):
        return list(range(len(theirs)))
    known = {name: place for place, name in enumerate(mine)}
    return [known.get(name, len(mine) + place) for place, name in enumerate(theirs)]


def _unknown(name: str) -> Hashable:
    return name


def _opsets(model: onnx.ModelProto | onnx.FunctionProto) -> dict[str, int]:
    return {"" if each.domain == "ai.onnx" else each.domain: each.version for each in model.opset_import}


def _compare(a: Side, b: Side, inside: str | None, found: _Found) -> Changes:
    """Add what is other in two graphs, and in those inside their matched nodes."""
    pairs = matching(a, b)
    constants = paired_constants(pairs)
    changes = Changes(pairs, constants)
    found.changes += [_placed(change, inside) for change in changes]
    found.initializers += constant_changes(pairs, constants)
    found.nodes_before += len(a.view.nodes)
    found.nodes_after += len(b.view.nodes)
    found.matched += len(pairs.to_b)
    found.moved += moved_constants(pairs, constants)
    for one, other in sorted(pairs.to_b.items()):
        mine, theirs = a.view.nodes[one], b.view.nodes[other]
        found.renamed += sum(left != right for left, right in zip(mine.output, theirs.output, strict=False))
        _compare_subgraphs(pairs, (one, other), constants, inside, found)
    return changes


def _placed(change: GraphChange, inside: str | None) -> GraphChange:
    if inside is None:
        return change
    return GraphChange(
        kind=change.kind, before=change.before, after=change.after, differences=change.differences, inside=inside
    )


def _compare_subgraphs(
    pairs: Matching, nodes: tuple[int, int], constants: dict[int, int], inside: str | None, found: _Found
) -> None:
    a, b = pairs.a, pairs.b
    one, other = nodes
    theirs = dict(subgraphs(b.view.nodes[other]))
    for name, graph in subgraphs(a.view.nodes[one]):
        if name not in theirs:
            continue
        views = GraphView(graph, a.view.folder), GraphView(theirs[name], b.view.folder)
        node = graph_node(a.view, one)
        place = f"{name} of {node.operator} {node.name or node.value}"
        outer = _outer_before(pairs, constants), _outer_after(pairs)
        sides = [
            Side(view, side.opsets, around, range(len(view.input_names)), range(len(view.outputs)))
            for view, side, around in zip(views, (a, b), outer, strict=True)
        ]
        _compare(sides[0], sides[1], f"{place}, {inside}" if inside else place, found)


def _outer_before(pairs: Matching, constants: dict[int, int]) -> Callable[[str], Hashable]:
    """Return what stands, in a subgraph of the first graph, for a value from around it: its counterpart's place."""
    view = pairs.a.view

    def outer(name: str) -> Hashable:
        source = view.source(name)
        if source.kind == "node":
            one = int(source.of)
            return ("node", pairs.to_b[one], source.slot) if one in pairs.to_b else ("before", one, source.slot)
        if source.kind == "constant":
            one = int(source.of)
            constant = pairs.b.view.constants[constants[one]] if one in constants else view.constants[one]
            return "constant", constant.digest
        return ("input", pairs.a.inputs[int(source.of)]) if source.kind == "input" else pairs.a.outer(name)

    return outer


def _outer_after(pairs: Matching) -> Callable[[str], Hashable]:
    view = pairs.b.view

    def outer(name: str) -> Hashable:
        source = view.source(name)
        if source.kind == "node":
            return "node", int(source.of), source.slot
        if source.kind == "constant":
            return "constant", view.constants[int(source.of)].digest
        return ("input", pairs.b.inputs[int(source.of)]) if source.kind == "input" else pairs.b.outer(name)

    return outer


def _compare_functions(a: OnnxFile, b: OnnxFile, found: _Found) -> None:
    mine, theirs = ({_function_name(each): each for each in file.model.functions} for file in (a, b))
    for name in mine:
        if name in theirs:
            sides = [
                Side(view, _opsets(function), _unknown, range(len(view.input_names)), range(len(view.outputs)))
                for function, folder in ((mine[name], a.path.parent), (theirs[name], b.path.parent))
                for view in [GraphView(function, folder)]
            ]
            _compare(sides[0], sides[1], f"function {name}", found)


def _function_name(function: onnx.FunctionProto) -> str:
    overload = getattr(function, "overload", "")
    return f"{function.domain}::{function.name}{f' ({overload})' if overload else ''}"


def _model_differences(a: OnnxFile, b: OnnxFile) -> Iterator[Difference]:
    for kind, mine, theirs in (
        ("input", a.inputs, b.inputs),
        ("output", list(a.model.graph.output), list(b.model.graph.output)),
    ):
        names = [each.name for each in mine], [each.name for each in theirs]
        positions = _positions(*names)
        ports = dict(zip(positions, theirs, strict=True))
        for place, port in enumerate(mine):
            after = ports.pop(place, None)
            texts = _port(port), None if after is None else _port(after)
            if texts[0] != texts[1]:
                yield Difference(what=f"{kind} {place}", before=texts[0], after=texts[1])
        yield from (Difference(what=f"{kind} {port.name}", before=None, after=_port(port)) for port in ports.values())
        if sorted(positions) == list(range(len(names[0]))) != positions:
            yield Difference(what=f"order of {kind}s", before=", ".join(names[0]), after=", ".join(names[1]))
    described = _described(a), _described(b)
    for what in dict.fromkeys((*described[0], *described[1])):
        values = described[0].get(what), described[1].get(what)
        if values[0] != values[1]:
            before, after = (None if value is None else shortened(value) for value in values)
            yield Difference(what=what, before=before, after=after)


def _described(file: OnnxFile) -> dict[str, str]:
    model = file.model
    fields = {
        "ir_version": str(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "domain": model.domain,
        "model_version": str(model.model_version or ""),
        "graph name": model.graph.name,
    }
    return {
        **{f"opset {domain}": str(version) for domain, version in file.opsets.items()},
        **{what: value for what, value in fields.items() if value},
        **{f"metadata {each.key}": each.value for each in model.metadata_props},
        **{f"function {_function_name(each)}": "there" for each in model.functions},
    }


def _port(port: onnx.ValueInfoProto) -> str:
    return f"{port.name} {port_text(port)}"


def _severity(change: InitializerChange) -> tuple[int, float]:
    """Return the order in a report: what changed, the largest error first, then what is gone, then what is new."""
    error = float(change.error) if change.error is not None else float("inf")
    return ("changed", "removed", "added").index(change.kind), -error
