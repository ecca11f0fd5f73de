"""onnxslim, if the extra ``slim`` is installed."""

from __future__ import annotations

import importlib.util

import onnx

from gradctl.forms.silence import silenced
from gradctl.onnxio.submodel import copy_of


def missing() -> str:
    """Return how to install onnxslim, or "" if it is installed."""
    return "" if importlib.util.find_spec("onnxslim") else "onnxslim is not installed: pip install 'gradctl[slim]'."


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph optimised by onnxslim."""
    import onnxslim

    with silenced():
        slimmed: onnx.ModelProto = onnxslim.slim(copy_of(model))
    return _with_inputs_of(model, slimmed)


def _with_inputs_of(model: onnx.ModelProto, slimmed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with its unused inputs, which onnxslim removes although callers still pass them."""
    own = {each.name for each in model.graph.initializer}
    left = {each.name: each for each in slimmed.graph.input}
    inputs = [left.get(each.name, each) for each in model.graph.input if each.name in left or each.name not in own]
    del slimmed.graph.input[:]
    slimmed.graph.input.extend(inputs)
    return slimmed
