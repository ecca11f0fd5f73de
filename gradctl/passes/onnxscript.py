"""onnxscript: constant folding, its optimizer (folds, inlines, removes until nothing changes), its rewrite rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnxscript.optimizer
import onnxscript.rewriter
from onnx_ir import from_proto, to_proto
from onnx_ir.passes import PassError

from gradctl.forms.silence import silenced


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with constants folded."""
    graph = from_proto(model)
    with _raising_causes():
        onnxscript.optimizer.fold_constants(graph)
        onnxscript.optimizer.remove_unused_nodes(graph)
    return to_proto(graph)


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph optimised by onnxscript."""
    with _raising_causes():
        optimized: onnx.ModelProto = onnxscript.optimizer.optimize(model)
    return optimized


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph rewritten by onnxscript's own rules."""
    with _raising_causes():
        rewritten: onnx.ModelProto = onnxscript.rewriter.rewrite(model)
    return rewritten


@contextmanager
def _raising_causes() -> Iterator[None]:
    """Silence onnxscript, and raise the original error of one of its passes, not its wrapper."""
    try:
        with silenced():
            yield
    except PassError as error:
        cause: BaseException = error
        while isinstance(cause, PassError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from error
