"""onnxslim, where the extra ``slim`` is installed."""

from __future__ import annotations

import importlib.util

import onnx

from gradctl.forms.silence import silenced


def missing() -> str:
    """Return how to install onnxslim, or nothing where it is there."""
    return "" if importlib.util.find_spec("onnxslim") else "onnxslim is not installed: pip install 'gradctl[slim]'."


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxslim makes of the graph."""
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with silenced():
        slimmed: onnx.ModelProto = onnxslim.slim(copy)
    return _with_inputs_of(model, slimmed)


def _with_inputs_of(model: onnx.ModelProto, slimmed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with the inputs that nothing uses, which onnxslim removes and callers still give."""
    own = {each.name for each in model.graph.initializer}
    left = {each.name: each for each in slimmed.graph.input}
    inputs = [left.get(each.name, each) for each in model.graph.input if each.name in left or each.name not in own]
    del slimmed.graph.input[:]
    slimmed.graph.input.extend(inputs)
    return slimmed
