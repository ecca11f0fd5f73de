"""Inputs that are drawn for a file: of the sizes that it states, where those can be had."""

from __future__ import annotations

import pytest
from onnx.parser import parse_model

from gradctl.checks.file_inputs import drawn_to_run
from gradctl.core.errors import TargetError
from gradctl.forms.onnx_file import read


def file_of(tmp_path, *sizes):
    model = parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[N] y) { y = Relu(x) }')
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in sizes:
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return read(tmp_path / "model.onnx")


def test_a_negative_size_is_a_free_one_as_onnxruntime_has_it(tmp_path):
    assert drawn_to_run(file_of(tmp_path, -1), 0)["x"].shape == (3,)


def test_for_a_size_that_memory_cannot_have_nothing_is_drawn(tmp_path):
    with pytest.raises(TargetError) as caught:
        drawn_to_run(file_of(tmp_path, 2**62), 0)
    assert str(caught.value) == (
        "GC104 nothing can be drawn for input 'x' of float32[4611686018427387904]; give it with --inputs."
    )
