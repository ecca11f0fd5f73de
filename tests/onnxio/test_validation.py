"""What a file says of itself: texts that are none, sizes that nothing has, other sizes of data, endless functions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.parser import parse_model

from gradctl.core.errors import TargetError
from gradctl.onnxio.onnx_file import parse, read
from gradctl.onnxio.validation import tensor_bytes

PLAIN = '<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[3] y) { y = Add(x, w) }'
CALLS = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (float[3] x) => (float[3] y) {{ y = local.f0(x) }}
    {functions}"""
FUNCTION = """<domain: "local", opset_import: ["" : 17, "local" : 1]> {name} (a) => (c) {{ {body} }}"""


def with_weight(**fields):
    """Return a graph that adds ``w``: one of these fields."""
    model = parse_model(PLAIN)
    model.graph.initializer.add(**{"name": "w", "data_type": TensorProto.FLOAT, **fields})
    return model


def with_functions(*bodies):
    functions = [FUNCTION.format(name=f"f{k}", body=body) for k, body in enumerate(bodies)]
    return parse_model(CALLS.format(functions="\n".join(functions)))


def refusal(tmp_path, model, act=read):
    path = tmp_path / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(TargetError) as caught:
        act(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("act", [parse, read])
def test_a_text_that_is_no_utf_8_is_damaged(tmp_path, act):
    content = parse_model(PLAIN.replace("y", "yyyy")).SerializeToString().replace(b"yyyy", b"y\xff\xffy")
    assert isinstance(onnx.load_from_string(content).graph.node[0].output[0], bytes)
    assert refusal(tmp_path, content, act) == (
        r"GC142 FILE is damaged: the text b'y\xff\xffy' is no UTF-8. Write or copy it again."
    )


def test_a_text_of_external_data_is_looked_at_too(tmp_path):
    model = with_weight(dims=[3], data_location=TensorProto.EXTERNAL)
    model.graph.initializer[0].external_data.add(key="location", value="wwww")
    content = model.SerializeToString().replace(b"wwww", b"w\xffww")
    assert "the text b'w\\xffww' is no UTF-8" in refusal(tmp_path, content)


@pytest.mark.parametrize("act", [parse, read])
@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ([-1], "[-1]"),
        ([0, -3], "[0, -3]"),
        ([2**62, 2], "[4611686018427387904, 2]"),
        ([0, 2**62, 2**62], "[0, 4611686018427387904, 4611686018427387904]"),
        ([2] * 100, "[2, 2, 2, 2, 2, 2, 2, 2, …]"),
    ],
    ids=["negative", "none and negative", "beyond counting", "none but beyond counting", "many axes"],
)
def test_sizes_that_no_tensor_has(tmp_path, act, sizes, shown):
    assert refusal(tmp_path, with_weight(dims=sizes), act) == (
        f"GC601 FILE: the tensor 'w' has the sizes {shown}, as none has. Write the file again."
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dims": [3], "raw_data": bytes(16)}, "holds 16 bytes, and [3] takes 12"),
        ({"dims": [3], "float_data": [1.0] * 4}, "holds 4 values, and [3] takes 3"),
        ({"dims": [], "raw_data": bytes(8)}, "holds 8 bytes, and [] takes 4"),
        ({"dims": [3], "data_type": TensorProto.INT4, "raw_data": bytes(3)}, "holds 3 bytes, and [3] takes 2"),
        ({"dims": [3], "data_type": TensorProto.BOOL, "int32_data": [1] * 4}, "holds 4 values, and [3] takes 3"),
        ({"dims": [2], "data_type": TensorProto.COMPLEX64, "float_data": [1.0] * 5}, "holds 5 values, and [2] takes 4"),
        (
            {"dims": [1], "data_type": TensorProto.STRING, "string_data": [b"a", b"b"]},
            "holds 2 values, and [1] takes 1",
        ),
    ],
    ids=str,
)
def test_data_that_are_longer_than_their_tensor_pass_the_checker_and_not_us(tmp_path, fields, said):
    model = with_weight(**fields)
    onnx.checker.check_model(model)
    assert refusal(tmp_path, model) == f"GC601 FILE: the tensor 'w' {said}. Write the file again."


ARRAYS = {
    "float": np.ones((2, 3), np.float32),
    "scalar": np.float64(1.0),
    "empty": np.ones((0, 3), np.int64),
    "bool": np.array([True, False]),
    "complex": np.ones(2, np.complex64),
    "half": np.ones(3, np.float16),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_what_onnx_writes_of_an_array_has_the_right_size(tmp_path, array):
    tensor = onnx.numpy_helper.from_array(np.asarray(array), "v")
    model = with_weight(dims=[3], float_data=[1.0, 2.0, 3.0])
    model.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert tensor_bytes(tensor) == np.asarray(array).nbytes
    assert [each.name for each in read(tmp_path / "model.onnx").model.graph.initializer] == ["w", "v"]


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED", "STRING"}), ids=str.lower)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "values"])
def test_a_tensor_that_onnx_makes_of_any_type_is_read(tmp_path, kind, raw):
    number = TensorProto.DataType.Value(kind)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    array = np.ones((1, 3)).astype(dtype)
    tensor = onnx.numpy_helper.from_array(array, "v") if raw else onnx.helper.make_tensor("v", number, [1, 3], array)
    model = with_weight(dims=[3], float_data=[1.0, 2.0, 3.0])
    model.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert read(tmp_path / "model.onnx").model.graph.initializer[1] == tensor


def test_strings_have_no_size_of_their_own():
    assert tensor_bytes(onnx.helper.make_tensor("words", TensorProto.STRING, [1], [b"a"])) is None
    assert tensor_bytes(TensorProto(name="w", data_type=99)) is None


def test_functions_that_end_are_read(tmp_path):
    model = with_functions("b = local.f1(a) c = local.f1(b)", "c = Relu(a)")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert [each.name for each in read(tmp_path / "model.onnx").model.functions] == ["f0", "f1"]


@pytest.mark.parametrize(
    ("bodies", "name"),
    [
        (["c = local.f0(a)"], "f0"),
        (["c = local.f1(a)", "c = local.f0(a)"], "f0"),
        (["c = Relu(a)", "b = local.f2(a) c = Relu(b)", "c = local.f1(a)"], "f1"),
        (["t = Constant<value = bool {1}>() c = If(t) <then_branch = g () => (d) { d = local.f0(a) }>"], "f0"),
    ],
    ids=["itself", "in two steps", "not called", "in a branch"],
)
def test_a_function_that_calls_itself_is_refused(tmp_path, bodies, name):
    assert refusal(tmp_path, with_functions(*bodies)) == (
        f"GC601 FILE: the function {name!r} calls itself. Write the file again."
    )


def test_functions_that_call_each_other_twice_are_no_small_graph(tmp_path):
    bodies = [f"b = local.f{k + 1}(a) c = local.f{k + 1}(b)" for k in range(40)]
    model = with_functions(*bodies, "c = Relu(a)")
    assert len(model.SerializeToString()) < 4000
    assert refusal(tmp_path, model) == (
        "GC601 FILE has 3.3e+12 nodes with its functions put in their places, and at most 1048576 are run here. "
        "Write it with fewer."
    )


def test_functions_lie_in_each_other_only_so_deep(tmp_path):
    bodies = [f"c = local.f{k + 1}(a)" for k in range(200)]
    assert refusal(tmp_path, with_functions(*bodies, "c = Relu(a)")) == (
        "GC601 FILE: the function 'f101' lies in 100 others. Write the file again."
    )


def in_each_other(wrap, depth):
    """Return a message that lies in ``depth`` others."""
    inner = b""
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def field(number, content):
    size = len(content)
    lengths = []
    while size > 127:
        lengths.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *lengths, size]) + content


@pytest.mark.parametrize(
    "deep",
    [
        field(7, field(1, in_each_other(lambda inner: field(5, field(6, field(1, inner))), 5000))),
        field(7, field(11, field(2, in_each_other(lambda inner: field(4, field(1, inner)), 5000)))),
    ],
    ids=["subgraphs", "types"],
)
@pytest.mark.parametrize("act", [parse, read])
def test_messages_that_lie_too_deep_in_each_other_are_no_model(tmp_path, deep, act):
    content = parse_model(PLAIN).SerializeToString() + deep
    assert refusal(tmp_path, content, act) == "GC142 FILE is damaged, or no ONNX file. Write or copy it again."
