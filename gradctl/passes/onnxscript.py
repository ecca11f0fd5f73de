"""onnxscript: constant folding, its optimizer (folds, inlines, removes until nothing changes), its rewrite rules."""

from __future__ import annotations

import onnx
import onnxscript.optimizer
import onnxscript.rewriter
from onnx_ir import from_proto, to_proto

from gradctl.forms.quiet import quiet

__all__ = ["fold", "optimize", "rewrite"]


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with all that hangs on constants alone computed."""
    graph = from_proto(model)
    with quiet():
        onnxscript.optimizer.fold_constants(graph)
        onnxscript.optimizer.remove_unused_nodes(graph)
    return to_proto(graph)


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxscript's optimizer makes of the graph."""
    with quiet():
        optimized: onnx.ModelProto = onnxscript.optimizer.optimize(model)
    return optimized


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxscript's own rewrite rules make of the graph."""
    with quiet():
        rewritten: onnx.ModelProto = onnxscript.rewriter.rewrite(model)
    return rewritten
