"""What the named cases of optimisers share: passes over a graph in memory, and what a file computes."""

from __future__ import annotations

import onnx
import onnxruntime

from gradctl.commands.optimize import Options, optimize_file
from gradctl.core.allows import Allows
from gradctl.passes.table import PASSES, passes_of_level

__all__ = ["computed", "findings", "optimized", "parsed", "statuses"]


def parsed(text, inputs, outputs, constants=None, *, opset=20, functions="", domains=""):
    """Return a graph of ONNX's text form, with arrays as its initializers."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {text} }} {functions}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def optimized(folder, model, *passes, level="default", allows=()):
    """Return what passes make of a graph, or those of a level; the result is ``after.onnx`` in the folder."""
    onnx.save(model, folder / "before.onnx")
    chosen = [PASSES.get(each, each) for each in passes] or passes_of_level(level)
    return optimize_file(folder / "before.onnx", folder / "after.onnx", Options(chosen, allows=Allows(allows)))


def findings(outcome):
    """Return the findings by what accepts them."""
    return sorted(each.allow or each.code for each in outcome.unit.findings)


def statuses(outcome):
    """Return what became of each pass."""
    return {each.name: each.status for each in outcome.unit.optimization.passes}


def computed(path, **feeds):
    """Return the first output of a file, onnxruntime's optimiser off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
