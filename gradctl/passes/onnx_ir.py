"""The common passes of onnx-ir: each removes unused or duplicate parts of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        taken: set[ir.Value | None] = set()
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


def _is_safe(node: ir.Node, taken: set[ir.Value | None]) -> bool:
    """Return whether no other output is the input of this Identity, and add the input to ``taken``."""
    if not node.outputs[0].is_graph_output():
        return True
    given = node.inputs[0]
    is_other = given is not None and given.is_graph_output()
    while given is not None and (producer := given.producer()) is not None and _is_identity(producer):
        given = producer.inputs[0]
        is_other = is_other or (given is not None and given.is_graph_output())
    producer = given.producer() if given is not None else None
    is_free = producer is not None and producer.graph is node.graph and not is_other and given not in taken
    taken.add(given)
    return is_free


def _unused() -> list[ir.passes.PassBase]:
    functions = common.RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
    return [functions, common.RemoveUnusedOpsetsPass()]


def without_unused_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model without the imports of unused operator sets."""
    return _run(lambda: [common.RemoveUnusedOpsetsPass()])(model)


# Name → (level, what it does, how).
PASSES: dict[str, tuple[str, str, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
    "inline": (
        "safe",
        "puts the functions of the file into the graph",
        _run(lambda: [common.InlinePass(), *_unused()]),
    ),
    "unused": (
        "safe",
        "removes nodes, initializers, functions and opsets that no output needs",
        _run(lambda: [common.RemoveUnusedNodesPass(), *_unused()]),
    ),
    "identity": ("safe", "removes Identity nodes", _run(lambda: [_Identities()])),
    "constants": (
        "safe",
        "turns Constant nodes into initializers",
        _run(lambda: [common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)]),
    ),
    "duplicates": (
        "safe",
        "shares initializers of the same content",
        _run(lambda: [common.DeduplicateInitializersPass(), common.DeduplicateHashedInitializersPass()]),
    ),
    "subexpressions": (
        "safe",
        "computes once what is computed twice",
        _run(lambda: [common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()]),
    ),
}
