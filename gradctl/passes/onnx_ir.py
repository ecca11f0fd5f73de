"""The common passes of onnx-ir: each removes unused or duplicate parts of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

_Made = Callable[[], Sequence[ir.passes.PassBase]]


def _run(made: _Made) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def apply(model: onnx.ModelProto) -> onnx.ModelProto:
        graph = ir.from_proto(model)
        for each in made():
            graph = each(graph).model
        cleaned = ir.to_proto(graph)
        # Of two equal nodes the first stays, and replaces an output of the second; its type may be unknown.
        for output, before in zip(cleaned.graph.output, model.graph.output, strict=True):
            if not output.HasField("type"):
                output.type.CopyFrom(before.type)
        return cleaned

    return apply


class _Identities(ir.passes.InPlacePass):
    """onnx-ir's Identity elimination, except for the nodes that it handles incorrectly (1.1).

    It renames the input of an Identity that computes an output, even if the input is an output itself, or an outer
    value: a branch then loses an output, and a graph one of two outputs of the same value. Such nodes are kept.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the model, changed in place."""
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        taken: set[ir.Value] = set()
        hidden = [
            node
            for graph in graphs
            for node in ir.traversal.RecursiveGraphIterator(graph)
            if _is_identity(node) and not _is_safe(node, taken)
        ]
        for node in hidden:
            node.domain = "gradctl.kept"
        result = common.IdentityEliminationPass()(model)
        for node in hidden:
            node.domain = ""
        return result


def _is_identity(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("", "Identity")


def _is_safe(node: ir.Node, taken: set[ir.Value]) -> bool:
    """Return whether no other output is the input of this Identity, and add the input to ``taken``."""
    if not node.outputs[0].is_graph_output():
        return True
    values = list(_equal_values(node.inputs[0]))
    source, producer = values[-1], values[-1].producer()
    is_output = any(value.is_graph_output() for value in values)
    is_safe = producer is not None and producer.graph is node.graph and not is_output and source not in taken
    taken.add(source)
    return is_safe


def _equal_values(value: ir.Value | None) -> Iterator[ir.Value]:
    """Yield a value, and the inputs of the Identity nodes that compute it, up to the first node of another operator."""
    while value is not None:
        yield value
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and _is_identity(producer) else None


def _unused() -> list[ir.passes.PassBase]:
    functions = common.RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
    return [functions, common.RemoveUnusedOpsetsPass()]


def without_unused_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the imports of unused operator sets."""
    return _run(lambda: [common.RemoveUnusedOpsetsPass()])(model)


# Name → (what it does, how). All have the level "safe".
PASSES: dict[str, tuple[str, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
    "inline": ("puts the functions of the file into the graph", _run(lambda: [common.InlinePass(), *_unused()])),
    "unused": (
        "removes nodes, initializers, functions and opsets that no output needs",
        _run(lambda: [common.RemoveUnusedNodesPass(), *_unused()]),
    ),
    "identity": ("removes Identity nodes", _run(lambda: [_Identities()])),
    "constants": (
        "turns Constant nodes into initializers",
        _run(lambda: [common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)]),
    ),
    "duplicates": (
        "shares initializers of the same content",
        _run(lambda: [common.DeduplicateInitializersPass(), common.DeduplicateHashedInitializersPass()]),
    ),
    "subexpressions": (
        "computes repeated subexpressions once",
        _run(lambda: [common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()]),
    ),
}
