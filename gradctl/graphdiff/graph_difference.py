"""Structural comparison of two ONNX files: nodes, constants, inputs, outputs, opsets, metadata.

Subgraphs of matched nodes, and functions of one name, are compared in the same way. Not compared: documentation,
names and metadata of nodes, types of inner values (``value_info``), training information.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import onnx

from gradctl.core.structure import Difference, GraphChange, GraphNode, GraphPart, InitializerChange, Structure
from gradctl.graphdiff.constant_matching import constant_changes, count_moved_constants, match_constants
from gradctl.graphdiff.graph_changes import Changes, graph_node
from gradctl.graphdiff.graph_parts import changed_parts, select_parts
from gradctl.graphdiff.graph_view import GraphView, operators, shorten, subgraphs
from gradctl.graphdiff.node_colours import Side
from gradctl.graphdiff.node_matching import match_nodes
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.session import port_text

_MOST_CHANGES = 1000  # in each list of a report: 1000 are about 300 KiB of JSON


@dataclass(frozen=True, slots=True)
class SharedValue:
    """A value of the first graph and its counterpart in the second, each with the node that computes it."""

    before: str
    after: str
    node_before: GraphNode
    node_after: GraphNode


@dataclass(frozen=True, slots=True)
class ComparedStructure:
    """The differences of two files, and the values that they share, in the order of the first."""

    structure: Structure
    values: tuple[SharedValue, ...]


@dataclass(slots=True)
class _Found:
    """The results so far, of the graphs and their subgraphs."""

    changes: list[GraphChange]
    initializers: list[InitializerChange]
    nodes_before: int = 0
    nodes_after: int = 0
    matched: int = 0
    renamed: int = 0
    moved: int = 0
    parts: list[GraphPart] = field(default_factory=list)


def compare_structure(a: OnnxFile, b: OnnxFile) -> ComparedStructure:
    """Return the differences of ``b`` from ``a``. External data are read, one pair of tensors at a time."""
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
        parts=tuple(select_parts(found.parts)),
    )
    a_view, b_view = sides[0].view, sides[1].view
    values = (
        SharedValue(
            a_view.name_of(reference),
            b_view.name_of(candidate),
            graph_node(a_view, reference.place),
            graph_node(b_view, candidate.place),
        )
        for reference, candidate in changes.values()
    )
    return ComparedStructure(structure, tuple(values))


def _sides(a: OnnxFile, b: OnnxFile) -> tuple[Side, Side]:
    sides = [Side(GraphView(each.model.graph, each.path.parent), _opsets(each.model), str) for each in (a, b)]
    names = [[port.name for port in each.model.graph.output] for each in (a, b)]
    sides[1].inputs = _positions(sides[0].view.input_names, sides[1].view.input_names)
    sides[1].outputs = _positions(*names)
    return sides[0], sides[1]


def _positions(reference: Sequence[str], candidate: Sequence[str]) -> list[int]:
    """Return the position in the first graph of each port of the second: by name, or by order if names differ."""
    if len(reference) == len(candidate) and set(reference) != set(candidate):
        return list(range(len(candidate)))
    known = {name: place for place, name in enumerate(reference)}
    return [known.get(name, len(reference) + place) for place, name in enumerate(candidate)]


def _opsets(model: onnx.ModelProto | onnx.FunctionProto) -> dict[str, int]:
    return {"" if each.domain == "ai.onnx" else each.domain: each.version for each in model.opset_import}


def _compare(a: Side, b: Side, inside: str | None, found: _Found) -> Changes:
    """Add the differences of two graphs, and of the subgraphs of their matched nodes."""
    pairs = match_nodes(a, b)
    constants = match_constants(pairs)
    changes = Changes(pairs, constants)
    found.changes += [msgspec.structs.replace(change, inside=inside) for change in changes]
    found.parts += [msgspec.structs.replace(part, inside=inside) for part in changed_parts(changes)]
    found.initializers += constant_changes(pairs, constants)
    found.nodes_before += len(a.view.nodes)
    found.nodes_after += len(b.view.nodes)
    found.matched += len(pairs.to_b)
    found.moved += count_moved_constants(pairs, constants)
    outputs = ((a.view.nodes[one].output, b.view.nodes[other].output) for one, other in pairs.to_b.items())
    found.renamed += sum(left != right for names in outputs for left, right in zip(*names, strict=False))
    _compare_subgraphs(a, b, constants, inside, found)
    return changes


def _compare_subgraphs(a: Side, b: Side, constants: Mapping[int, int], inside: str | None, found: _Found) -> None:
    digests = [each.digest for each in b.view.constants]
    outer_a = _identify_outer(
        a,
        [a.counterparts.get(place, ("before", place)) for place in range(len(a.view.nodes))],
        [digests[constants[at]] if at in constants else each.digest for at, each in enumerate(a.view.constants)],
    )
    outer_b = _identify_outer(b, range(len(b.view.nodes)), digests)
    for one, other in sorted(a.counterparts.items()):
        node, graphs = graph_node(a.view, one), dict(subgraphs(b.view.nodes[other]))
        for name, graph in subgraphs(a.view.nodes[one]):
            if name in graphs:
                place = f"{name} of {node.operator} {node.name or node.value}{f', {inside}' if inside else ''}"
                _compare(a.subgraph(graph, outer_a), b.subgraph(graphs[name], outer_b), place, found)


def _identify_outer(side: Side, nodes: Sequence[Hashable], digests: Sequence[bytes]) -> Callable[[str], Hashable]:
    """Return the function that identifies, in subgraphs of a graph, a value from around them.

    Args:
        side: the graph around.
        nodes: the identity of each of its nodes, equal for counterparts.
        digests: of its constants, equal for counterparts.
    """

    def identify(name: str) -> Hashable:
        source = side.view.source(name)
        return ("constant", digests[source.place]) if source.kind == "constant" else side.identity(source, nodes)

    return identify


def _compare_functions(a: OnnxFile, b: OnnxFile, found: _Found) -> None:
    reference, candidate = ({_function_name(each): each for each in file.model.functions} for file in (a, b))
    for name in reference:
        if name in candidate:
            left, right = (
                Side(GraphView(function, file.path.parent), _opsets(function), str)
                for function, file in ((reference[name], a), (candidate[name], b))
            )
            _compare(left, right, f"function {name}", found)


def _function_name(function: onnx.FunctionProto) -> str:
    overload = getattr(function, "overload", "")
    return f"{function.domain}::{function.name}{f' ({overload})' if overload else ''}"


def _model_differences(a: OnnxFile, b: OnnxFile) -> Iterator[Difference]:
    yield from _port_differences("input", a.inputs, b.inputs)
    yield from _port_differences("output", a.model.graph.output, b.model.graph.output)
    before, after = _describe(a), _describe(b)
    for what in dict.fromkeys((*before, *after)):
        if before.get(what) != after.get(what):
            texts = [None if what not in each else shorten(each[what]) for each in (before, after)]
            yield Difference(what=what, before=texts[0], after=texts[1])


def _port_differences(
    kind: str, a: Sequence[onnx.ValueInfoProto], b: Sequence[onnx.ValueInfoProto]
) -> Iterator[Difference]:
    names = [each.name for each in a], [each.name for each in b]
    positions = _positions(*names)
    ports = dict(zip(positions, b, strict=True))
    for place, port in enumerate(a):
        before, after = _port(port), _port(ports.pop(place)) if place in ports else None
        if before != after:
            yield Difference(what=f"{kind} {place}", before=before, after=after)
    yield from (Difference(what=f"{kind} {port.name}", before=None, after=_port(port)) for port in ports.values())
    if sorted(positions) == list(range(len(a))) != positions:
        yield Difference(what=f"order of {kind}s", before=", ".join(names[0]), after=", ".join(names[1]))


def _describe(file: OnnxFile) -> dict[str, str]:
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
    """Return the order in a report: changed, the largest error first, then removed, then added."""
    error = float(change.error) if change.error is not None else float("inf")
    return ("changed", "removed", "added").index(change.kind), -error
