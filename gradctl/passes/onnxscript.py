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
    """Return the graph with all that hangs on constants alone computed."""
    graph = from_proto(model)
    with _told():
        onnxscript.optimizer.fold_constants(graph)
        onnxscript.optimizer.remove_unused_nodes(graph)
    return to_proto(graph)


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxscript's optimizer makes of the graph."""
    with _told():
        optimized: onnx.ModelProto = onnxscript.optimizer.optimize(model)
    return optimized


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxscript's own rewrite rules make of the graph."""
    with _told():
        rewritten: onnx.ModelProto = onnxscript.rewriter.rewrite(model)
    return rewritten


@contextmanager
def _told() -> Iterator[None]:
    """Keep onnxscript from printing, and raise what one of its passes raised, not that step 0 raised something."""
    try:
        with silenced():
            yield
    except PassError as error:
        cause: BaseException = error
        while isinstance(cause, PassError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from error
