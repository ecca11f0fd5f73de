"""Passes over onnx-ir, most of them its own: each takes out what no output needs, or what is there twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["PASSES", "without_unused_opsets"]

_Made = Callable[[], Sequence[ir.passes.PassBase]]


def _run(made: _Made) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def apply(model: onnx.ModelProto) -> onnx.ModelProto:
        graph = ir.from_proto(model)
        for each in made():
            graph = each(graph).model
        return ir.to_proto(graph)

    return apply


class _Identities(ir.passes.InPlacePass):
    """Removes Identity nodes, of which onnx-ir's own pass takes too many (1.1).

    1. What is no output of its graph gives way to what it was made of.
    2. An output does too, and leaves it its name, if that was made in the same graph and is no output of it.
    3. All others stay. onnx-ir renames those too: a branch loses an output that comes from outside, and a graph one of
       two outputs of the same value.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the model, changed in place."""
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        found = [
            node
            for graph in graphs
            for node in ir.traversal.RecursiveGraphIterator(graph)
            if (node.domain, node.op_type) == ("", "Identity") and node.inputs[0] is not None
        ]
        return ir.passes.PassResult(model, modified=sum(map(_eliminated, found)) > 0)


def _eliminated(node: ir.Node) -> bool:
    given, made = node.inputs[0], node.outputs[0]
    assert given is not None and node.graph is not None  # an Identity takes one, and was found in a graph
    producer = given.producer()
    is_output = made.is_graph_output()
    if is_output and (producer is None or producer.graph is not node.graph or given.is_graph_output()):
        return False
    given.type = given.type or made.type
    given.shape = (made.shape or given.shape) if is_output else (given.shape or made.shape)
    ir.convenience.replace_all_uses_with(made, given, replace_graph_outputs=True)
    if is_output:
        given.name = made.name
    node.graph.remove(node, safe=True)
    return True


def _unused() -> list[ir.passes.PassBase]:
    functions = common.RemoveUnusedFunctionsPass()  # type: ignore[no-untyped-call]
    return [functions, common.RemoveUnusedOpsetsPass()]


def without_unused_opsets(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that imports no operator set which it does not use."""
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
