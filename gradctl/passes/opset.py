"""The graph in another version of ONNX's operator set: onnxscript's converter, and ONNX's own where that gives up."""

from __future__ import annotations

import onnx
import onnx.version_converter
from onnx_ir import from_proto, to_proto
from onnxscript.version_converter import convert_version

from gradctl.forms.silence import silenced
from gradctl.passes.pass_result import NotApplicable, Pass


def conversion(version: int) -> Pass:
    """Return the pass that converts to one version, up or down."""
    return Pass(
        f"opset-{version}",
        None,
        "onnxscript",
        f"converts to opset {version}",
        lambda model: _converted(model, version),
        may_grow=True,
    )


def _converted(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    given = _opset(model)
    if given == version:
        raise NotApplicable(f"the graph has opset {version} already.")
    graph = from_proto(model)
    with silenced():
        if version > (given or 0):
            convert_version(graph, version, fallback=True)
        converted = to_proto(graph)
        if _opset(converted) != version:
            converted = onnx.version_converter.convert_version(model, version)
    if _opset(converted) != version:
        raise ValueError(f"neither onnxscript nor onnx converts opset {given} to {version}")
    return converted


def _opset(model: onnx.ModelProto) -> int | None:
    return {each.domain: each.version for each in model.opset_import}.get("")
