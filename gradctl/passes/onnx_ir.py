"""The common passes of onnx-ir: each takes out what no output needs, or what is there twice."""

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
    "identity": ("safe", "removes Identity nodes", _run(lambda: [common.IdentityEliminationPass()])),
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
