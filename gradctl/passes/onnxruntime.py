"""onnxruntime's graph optimiser, run offline: what a session would do when it is made, kept as a file.

Basic keeps to ONNX's own operators but for a few; extended fuses into operators that only onnxruntime has; all also
changes layouts for the processor it runs on, so that its result is of use on this machine only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime

from gradctl.forms.onnx_file import said_by_onnxruntime
from gradctl.passes.onnx_ir import without_unused_opsets

__all__ = ["offline"]


def offline(level: str) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """Return the pass of one level: ``BASIC``, ``EXTENDED`` or ``ALL``."""

    def apply(model: onnx.ModelProto) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            try:
                onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
                raise RuntimeError(said_by_onnxruntime(error)) from error
            # onnxruntime imports every operator set that it knows.
            return without_unused_opsets(onnx.load(path))

    return apply
