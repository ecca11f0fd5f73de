"""Valid files that are mutated, and the model that some of them belong to."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import onnx
import torch
from onnx.parser import parse_model
from safetensors.torch import save

from gradctl.report.machine.json import render
from tests.report.examples import passing, wrong_weight

__all__ = ["MODEL", "archives", "configurations", "onnx_models", "reports", "tensor_files", "weight_bytes"]

MODEL = """
import torch
from torch import nn


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def example_inputs():
    return (torch.ones(2, 4),)
"""

_BRANCHES = """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[2,4] y) {
    s = ReduceSum<keepdims=0>(x) z = Constant<value = float {0.0}>() c = Less(z, s)
    y = If(c) <then_branch = t () => (float[2,4] a) { a = Add(x, x) },
               else_branch = e () => (float[2,4] b) { b = Abs(x) }>
}"""
_FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2,4] x) => (float[2,4] y) { h = local.shift(x) y = local.shift(h) }
    <domain: "local", opset_import: ["" : 17]>
    shift (a) => (b) { c = Constant<value = float {1.0}>() b = Add(a, c) }"""
# How often it runs is no constant: a number of 2**62 there is a right file, which runs that long.
_LOOP = """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[2,4] y) {
    n = Size(x) t = Constant<value = bool {1}>()
    y = Loop(n, t, x) <body = b (int64 i, bool c, float[2,4] v) => (bool d, float[2,4] w) {
        d = Identity(c) w = Tanh(v) }>
}"""
_SHAPES = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,2,2] y) {
    s = Constant<value = int64[3] {0, 2, 2}>() r = Reshape(x, s) y, m = Dropout(r)
}"""
_CONVOLUTION = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1,1,6,6] x) => (float[1,2,2,2] y) <float[2,1,3,3] w = {
        1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}> {
    h = Conv<pads = [0, 0, 0, 0], kernel_shape = [3, 3]>(x, w) y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
}"""
_SEQUENCE = """<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] x) => (float[4,4] y) {
    s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s)
}"""


@cache
def onnx_models() -> list[onnx.ModelProto]:
    """Return graphs of several kinds; the first is MODEL, and the second too, with weights in ``weights.bin``."""
    return [_mlp(), _external(), *map(parse_model, (_BRANCHES, _FUNCTION, _LOOP, _SHAPES, _CONVOLUTION, _SEQUENCE))]


@cache
def weight_bytes() -> bytes:
    """Return what is in ``weights.bin``."""
    return b"".join(array.tobytes() for array in _arrays().values())


@cache
def tensor_files() -> dict[str, bytes]:
    """Return weights of MODEL, and its input, as safetensors."""
    weights = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    return {"weights": save(weights), "inputs": save({"input": torch.ones(2, 4)})}


@cache
def archives() -> dict[str, bytes]:
    """Return the input of MODEL as numpy has it, its weights as torch has them (now, and until 1.5), and a program."""
    weights = {name: torch.from_numpy(array) for name, array in _arrays().items()}
    written = {name: io.BytesIO() for name in ("npz", "checkpoint", "old", "program")}
    np.savez(written["npz"], input=np.ones((2, 4), np.float32))
    torch.save(weights, written["checkpoint"])
    torch.save(weights, written["old"], _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.trace(_model(), torch.ones(2, 4)), written["program"])
    return {name: content.getvalue() for name, content in written.items()}


@cache
def reports() -> list[bytes]:
    """Return reports as ``--format json`` prints them."""
    return [render(each).encode() for each in (passing(), wrong_weight())]


@cache
def configurations() -> list[bytes]:
    """Return configurations of ``gradctl check``."""
    return [_CONFIGURATION.encode()]


def _arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in _model().state_dict().items()}


def _model() -> torch.nn.Module:
    namespace: dict = {}
    exec(MODEL, namespace)
    return namespace["make_model"]()


def _mlp() -> onnx.ModelProto:
    model = parse_model("""<ir_version: 8, opset_import: ["" : 17]> g (float[2,4] input) => (float[2,2] output) {
        a = Gemm<transB = 1>(input, w0, b0) h = Relu(a) output = Gemm<transB = 1>(h, w2, b2)
    }""")
    names = dict(zip(("w0", "b0", "w2", "b2"), _arrays(), strict=True))
    for node in model.graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in _arrays().items())
    return model


def _external() -> onnx.ModelProto:
    model, offset = _mlp(), 0
    for tensor in model.graph.initializer:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "weights.bin", "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        offset += size
    return model


_CONFIGURATION = """# what is checked
seed = 3
jobs = 2
timeout = 60.5
memory = "8GiB"

[[targets]]
target = "net.py:make_model"
name = "small"
forms = ["trace", "export"]
args = { width = 4, deep = true }
input = ["x=f32[2,4]"]
expect = { export = "fail" }
allow = ["GC408:Round"]

[[targets]]
target = "net.py:make_model"
weights = "w.safetensors"
train = false

[[allow]]
finding = "GC402:param:0.weight"
form = "trace"
error = 1e-3
reason = "known"
"""
