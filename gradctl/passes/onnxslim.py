"""onnxslim, where the extra ``slim`` is installed."""

from __future__ import annotations

import importlib.util

import onnx

from gradctl.forms.quiet import quiet

__all__ = ["missing", "slim"]


def missing() -> str:
    """Return how to install onnxslim, or nothing where it is there."""
    return "" if importlib.util.find_spec("onnxslim") else "onnxslim is not installed: pip install 'gradctl[slim]'."


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return what onnxslim makes of the graph."""
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        slimmed: onnx.ModelProto = onnxslim.slim(copy)
    return slimmed
