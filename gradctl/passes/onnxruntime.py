"""onnxruntime's graph optimiser, run offline: the optimisations of a new session, saved as a file.

Basic uses ONNX's own operators with few exceptions; extended fuses into operators that only onnxruntime has; all also
changes layouts for the current processor, so that its result is useful on this machine only.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import onnx
import onnxruntime

from gradctl.onnxio.onnx_file import onnxruntime_message
from gradctl.onnxio.validation import nodes
from gradctl.passes.onnx_ir import without_unused_opsets
from gradctl.passes.pass_result import onnx_opset

_OPSET_OF_LAYER_NORM = 17
_RMS_NORM_FUSIONS = ("SimplifiedLayerNormFusion",)
_LAYER_NORM_FUSIONS = ("LayerNormFusion", "LayerNormFusionL1", "LayerNormFusionL2")


def offline_pass(level: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Return the pass of one level: ``BASIC``, ``EXTENDED`` or ``ALL``."""

    def apply(model: onnx.ModelProto) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            given, path = Path(folder) / "given.onnx", Path(folder) / "optimized.onnx"
            onnx.save(model, given)
            options.optimized_model_filepath = str(path)
            try:
                onnxruntime.InferenceSession(
                    given,
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=_left_to_sessions(model),
                )
            except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
                raise RuntimeError(onnxruntime_message(error)) from error
            # onnxruntime imports every operator set that it knows.
            return without_unused_opsets(_rename_initializers(onnx.load(path), model, level.lower()))

    return apply


def _left_to_sessions(model: onnx.ModelProto) -> list[str]:
    """Return the fusions whose operators onnxruntime puts into ONNX's own domain, which does not define them.

    A file with one is not valid ONNX. Sessions still fuse them in memory.
    """
    opset = onnx_opset(model) or 0
    return [*_RMS_NORM_FUSIONS, *(_LAYER_NORM_FUSIONS if opset < _OPSET_OF_LAYER_NORM else ())]


def _rename_initializers(optimized: onnx.ModelProto, given: onnx.ModelProto, level: str) -> onnx.ModelProto:
    """Return a graph whose new initializers have names that onnxruntime does not use.

    Its fusions use fixed names (``gemm_input_shape``) without a check for duplicates, and session creation fails for a
    graph that already has one: a second run rejects the result of the first (1.32).
    """
    known = {each.name for each in given.graph.initializer}.union(*(node.output for node in nodes(given)))
    taken = known.union(*((*node.input, *node.output) for node in nodes(optimized)))
    new = [each for each in optimized.graph.initializer if each.name not in known]  # a folded value keeps its name
    names = {each.name: _free_name(each.name, level, taken) for each in new}
    for each in new:
        each.name = names[each.name]
    for node in nodes(optimized):
        node.input[:] = [names.get(name, name) for name in node.input]
    return optimized


def _free_name(name: str, level: str, taken: Collection[str]) -> str:
    free = (f"{level}{number or ''}/{name}" for number in itertools.count())
    return next(each for each in free if each not in taken)
