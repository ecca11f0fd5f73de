"""Inputs that are drawn for a file: of the sizes that it states, where those can be had."""

from __future__ import annotations

import pytest
import torch
from onnx.parser import parse_model

from gradctl.comparison.file_inputs import draw_inputs, extremes, vary_sizes
from gradctl.core.errors import TargetError
from gradctl.onnxio.onnx_file import read


def file_of(tmp_path, *sizes):
    model = parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[N] y) { y = Relu(x) }')
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in sizes:
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return read(tmp_path / "model.onnx")


def test_a_negative_size_is_a_free_one_as_onnxruntime_has_it(tmp_path):
    assert draw_inputs(file_of(tmp_path, -1), 0)["x"].shape == (3,)


def test_for_a_size_that_memory_cannot_have_nothing_is_drawn(tmp_path):
    with pytest.raises(TargetError) as caught:
        draw_inputs(file_of(tmp_path, 2**62), 0)
    assert str(caught.value) == (
        "GC104 nothing can be drawn for input 'x' of float32[4611686018427387904]; pass it with --inputs."
    )


def test_integers_stay_below_the_greatest_of_the_example_and_what_is_the_same_everywhere_stays():
    example = {"ids": torch.tensor([7, 2, 9]), "mask": torch.tensor([1, 1]), "on": torch.tensor([True, False])}
    found = dict(extremes(example, 0))
    assert list(found) == ["lowest integers", "highest integers", "small integers", "negative integers"]
    assert found["lowest integers"]["ids"].tolist() == [0, 0, 0]
    assert found["highest integers"]["ids"].tolist() == [9, 9, 9]
    assert set(found["small integers"]["ids"].tolist()) <= {1, 2, 3}
    assert set(found["negative integers"]["ids"].tolist()) <= {-1, -2, -3}
    assert [found[f"{end} integers"]["on"].tolist() for end in ("lowest", "highest")] == [[False] * 2, [True] * 2]
    for trial in found.values():
        assert trial["mask"].tolist() == [1, 1]
        assert {name: value.dtype for name, value in trial.items()} == {
            name: value.dtype for name, value in example.items()
        }


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.uint64])
def test_each_kind_of_integer_has_its_ends(dtype):
    found = dict(extremes({"x": torch.tensor([3, 100]).to(dtype)}, 0))
    assert [found[f"{end} integers"]["x"].tolist() for end in ("lowest", "highest")] == [[0, 0], [100, 100]]
    assert found["negative integers"]["x"].dtype == dtype


def test_a_float_is_never_so_tiny_that_it_has_fewer_bits():
    tiny = dict(extremes({"x": torch.ones(100, dtype=torch.float16)}, 0))["tiny values"]["x"]
    assert float(tiny.abs().median()) >= torch.finfo(torch.float16).tiny
    assert float((tiny * tiny).abs().max()) <= torch.finfo(torch.float16).smallest_normal


def test_free_sizes_are_tried_larger_unequal_and_one(tmp_path):
    file = file_of(tmp_path, -1, -1)
    for size, name in zip(file.model.graph.input[0].type.tensor_type.shape.dim, "ab", strict=True):
        size.dim_param = name
    found = vary_sizes(file, {"x": torch.arange(6.0).reshape(2, 3)})
    sizes = {trial: tuple(feeds["x"].shape) for trial, feeds in found}
    assert sizes == {"larger sizes": (3, 4), "unequal sizes": (4, 6), "sizes of one": (1, 1)}
    assert list(vary_sizes(file_of(tmp_path, 2, 3), {"x": torch.ones(2, 3)})) == []
