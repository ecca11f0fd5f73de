"""Conversion to another version of ONNX's operator set by onnxscript, or by ONNX if onnxscript fails."""

from __future__ import annotations

import onnx
import onnx.version_converter
from onnx_ir import from_proto, to_proto
from onnxscript.version_converter import convert_version

from gradctl.forms.silence import silenced
from gradctl.passes.pass_result import NotApplicable, Pass, onnx_opset


def conversion(version: int) -> Pass:
    """Return the pass that converts to one version, up or down."""
    return Pass(
        f"opset-{version}",
        None,
        "onnxscript",
        f"converts to opset {version}",
        lambda model: _convert(model, version),
        may_grow=True,
    )


def _convert(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    given = onnx_opset(model)
    if given == version:
        raise NotApplicable(f"the graph has opset {version} already.")
    graph = from_proto(model)
    with silenced():
        if version > (given or 0):
            convert_version(graph, version, fallback=True)
        converted = to_proto(graph)
        if onnx_opset(converted) != version:
            converted = onnx.version_converter.convert_version(model, version)
    if onnx_opset(converted) != version:
        raise ValueError(f"neither onnxscript nor onnx converts opset {given} to {version}")
    return converted
