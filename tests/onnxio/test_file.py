"""ONNX files are data from strangers: what is damaged, invalid or leaves its folder is refused in words of its own."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.parser import parse_model

from gradctl.core.errors import TargetError, TrustError
from gradctl.onnxio.onnx_file import initializers, onnx_dtype_name, parse, read, session
from gradctl.onnxio.validation import nodes

W = np.arange(6, dtype=np.float32).reshape(2, 3)
AT = 8  # where W begins in the data file
DATA = bytes(AT) + W.tobytes()

RELU = "g (float[3] x) => (float[3] y) { y = Relu(x) }"
CALLS_LOCAL = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[2,3] x) => (float[2,3] y) { y = local.shift(x) }
    <domain: "local", opset_import: ["" : 17]>
    shift (a) => (b) { c = Constant<value = float {1.0}>() b = Add(a, c) }"""
BRANCHES = """g (float[2,3] x) => (float[2,3] y) {
    s = ReduceSum<keepdims=0>(x) z = Constant<value = float {0.0}>() c = Less(z, s)
    y = If(c) <then_branch = t () => (float[2,3] a) { a = Add(x, w) },
               else_branch = e () => (float[2,3] b) { b = Abs(x) }>
}"""


def graph(text, opsets='"" : 17'):
    return parse_model(f"<ir_version: 8, opset_import: [{opsets}]> {text}")


def written(path, model):
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path, act=read):
    """Return the message with which a file is refused."""
    with pytest.raises((TargetError, TrustError)) as caught:
        act(path)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, TrustError) == caught.value.code.startswith("GC9")
    return str(caught.value).replace(str(path), "FILE").replace(str(path.parent), "FOLDER")


def run(path, **inputs):
    return session(read(path)).run(None, inputs)


# ------------------------------------------------------------------ what is no model


def test_a_good_file_is_read_and_runs(tmp_path):
    path = written(tmp_path / "relu.onnx", graph(RELU))
    x = np.array([-1.0, 0.0, 2.0], np.float32)
    assert read(path).opsets == {"ai.onnx": 17}
    np.testing.assert_array_equal(run(path, x=x)[0], np.maximum(x, 0))


def test_a_missing_file_names_the_nearest(tmp_path):
    written(tmp_path / "model.onnx", graph(RELU))
    said = refusal(tmp_path / "mdel.onnx")
    assert said == "GC142 there is no file 'FILE' (did you mean 'model.onnx'?)."


def test_a_missing_file_with_nothing_like_it(tmp_path):
    assert refusal(tmp_path / "model.onnx") == "GC142 there is no file 'FILE'."


def test_a_folder_is_no_file(tmp_path):
    assert refusal(tmp_path) == "GC142 FILE is a folder; name a file in it."


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.onnx")
    said = "GC142 FILE is a pipe or a device, not a file. Write its contents to a file."
    assert refusal(tmp_path / "model.onnx") == said


def test_a_device_is_not_read_to_its_end(tmp_path):
    (tmp_path / "model.onnx").symlink_to("/dev/zero")
    said = "GC142 FILE is a pipe or a device, not a file. Write its contents to a file."
    assert refusal(tmp_path / "model.onnx") == said


def test_an_empty_file_is_refused_where_onnx_takes_it(tmp_path):
    path = tmp_path / "model.onnx"
    path.touch()
    onnx.load(path)
    assert refusal(path) == "GC142 FILE is empty. Write it again."


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 50), slice(0, -10), slice(0, -1)], ids=str)
def test_a_file_that_is_cut_off_is_damaged(tmp_path, kept):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(RELU).SerializeToString()[kept])
    assert refusal(path) == "GC142 FILE is damaged, or no ONNX file. Write or copy it again."


def test_a_file_cut_off_before_its_opset_has_none(tmp_path):
    model = graph(RELU)
    opset = len(model.opset_import[0].SerializeToString()) + 2
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString()[:-opset])
    onnx.load(path)
    assert refusal(path) == "GC142 FILE holds no ONNX graph with an opset. Write it again."


def test_a_file_cut_off_between_two_opsets_is_no_valid_model(tmp_path):
    model = graph("g (float[3] x) => (float[3] y) { y = local.twice(x) }", '"" : 17, "local" : 1')
    last = len(model.opset_import[1].SerializeToString()) + 2
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString()[:-last])
    onnx.load(path)
    assert refusal(path) == "GC601 FILE is not valid ONNX: No opset import for domain 'local'."


@pytest.mark.parametrize("content", [b"no model\n", b"{}", b"\x00" * 64], ids=["text", "json", "zeros"])
def test_a_file_of_another_kind_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert refusal(path) == "GC142 FILE is damaged, or no ONNX file. Write or copy it again."


def test_a_file_above_two_gib_is_not_read(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31 + 2**29)
    assert refusal(path) == ("GC142 FILE has 2.5 GiB, and an ONNX file at most 2. Write its weights as external data.")


def test_a_model_without_an_opset_is_none(tmp_path):
    model = graph(RELU)
    del model.opset_import[:]
    path = written(tmp_path / "model.onnx", model)
    assert refusal(path) == "GC142 FILE holds no ONNX graph with an opset. Write it again."


def test_a_model_without_a_graph_is_none(tmp_path):
    model = graph(RELU)
    model.ClearField("graph")
    path = written(tmp_path / "model.onnx", model)
    assert refusal(path) == "GC142 FILE holds no ONNX graph with an opset. Write it again."


# ------------------------------------------------------------------ what the checker refuses

_UNSORTED = (
    "Nodes in a graph must be topologically sorted, however input '{name}' of node: name: OpType: {operator} is not "
    "output of any previous nodes."
)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("y = Reluu(x)", "No Op registered for Reluu with domain_version of 17."),
        ("y = Add(x, b)", _UNSORTED.format(name="b", operator="Add")),
        ("y = Relu(h)  h = Abs(x)", _UNSORTED.format(name="h", operator="Relu")),
        ("h = Add(x, y)  y = Abs(h)", _UNSORTED.format(name="y", operator="Add")),
        ("y = com.acme.Twice(x)", "No opset import for domain 'com.acme'."),
        ("z = Relu(x)", "Graph output 'y' is not an output of any node in graph."),
    ],
    ids=["unknown operator", "missing input", "unsorted", "cyclic", "domain without a version", "output of no node"],
)
def test_an_invalid_graph_is_refused_and_still_parsed(tmp_path, body, said):
    path = written(tmp_path / "model.onnx", graph(f"g (float[3] x) => (float[3] y) {{ {body} }}"))
    assert refusal(path) == f"GC601 FILE is not valid ONNX: {said}"
    assert parse(path).model.graph.name == "g"


# ------------------------------------------------------------------ what onnxruntime does not run


@pytest.mark.parametrize(
    ("text", "opsets", "said"),
    [
        (
            "g (float[3] x) => (float[3] y) { y = com.acme.Twice(x) }",
            '"" : 17, "com.acme" : 1',
            "Fatal error: com.acme:Twice(-1) is not a registered function/op. It has operators of com.acme, which are "
            "not ONNX's own.",
        ),
        (
            "g (double[3] x) => (double[3] y) { y = Erf(x) }",
            '"" : 17',
            "Could not find an implementation for Erf(13) node with name ''.",
        ),
        (
            "g (int64[3] x) => (float[3] y) { y = Relu(x) }",
            '"" : 17',
            "Type Error: Type (tensor(float)) of output arg (y) of node () does not match expected type "
            "(tensor(int64)).",
        ),
    ],
    ids=["custom operator", "no kernel in double", "types that do not fit"],
)
def test_what_onnxruntime_cannot_run_says_why(tmp_path, text, opsets, said):
    path = written(tmp_path / "model.onnx", graph(text, opsets))
    message = refusal(path, lambda file: session(read(file)))
    assert message == f"GC602 FILE cannot be run by onnxruntime {onnxruntime.__version__}: {said}"


def test_an_opset_of_the_future_is_refused_without_the_names_of_its_functions(tmp_path):
    path = written(tmp_path / "model.onnx", graph(RELU, '"" : 99'))
    assert ": ONNX Runtime only *guarantees* support for models stamped with" in refusal(
        path, lambda file: session(read(file))
    )


def test_a_function_in_the_file_is_no_custom_operator(tmp_path):
    path = written(tmp_path / "model.onnx", parse_model(CALLS_LOCAL))
    np.testing.assert_array_equal(run(path, x=W)[0], W + 1)
    assert sorted(node.op_type for node in nodes(read(path).model)) == ["Add", "Constant", "shift"]


def test_without_optimisation_the_result_is_the_same(tmp_path):
    path = written(tmp_path / "model.onnx", parse_model(CALLS_LOCAL))
    (plain,) = session(read(path), optimised=False).run(None, {"x": W})
    np.testing.assert_array_equal(plain, W + 1)


# ------------------------------------------------------------------ external data


def tensor(location="w.bin", **entries):
    """Return W as an initializer whose data are in a file."""
    proto = onnx.TensorProto(name="w", dims=W.shape, data_type=onnx.TensorProto.FLOAT)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": AT, "length": W.nbytes, **entries}.items():
        if value is not None:
            proto.external_data.add(key=key, value=str(value))
    return proto


def in_graph(proto):
    model = graph("g (float[2,3] x) => (float[2,3] y) { y = Add(x, w) }")
    model.graph.initializer.append(proto)
    return model


def in_sparse(proto):
    model = graph("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    sparse = model.graph.sparse_initializer.add(dims=[9])
    sparse.values.CopyFrom(proto)
    return model


def in_subgraph(proto):
    model = graph(BRANCHES)
    next(node for node in model.graph.node if node.op_type == "If").attribute[0].g.initializer.append(proto)
    return model


def in_function(proto):
    model = parse_model(CALLS_LOCAL)
    model.functions[0].node[0].attribute[0].t.CopyFrom(proto)
    return model


def in_default_of_function(proto):
    model = parse_model(CALLS_LOCAL)
    model.functions[0].attribute_proto.add(name="v", type=onnx.AttributeProto.TENSOR).t.CopyFrom(proto)
    constant = model.functions[0].node[0].attribute[0]
    constant.Clear()
    constant.name, constant.ref_attr_name, constant.type = "value", "v", onnx.AttributeProto.TENSOR
    return model


RUNNABLE = [in_graph, in_subgraph, in_function, in_default_of_function]


@pytest.fixture
def folder(tmp_path):
    """Give a folder with a data file, below one with another."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "w.bin").write_bytes(DATA)
    (tmp_path / "secret.bin").write_bytes(DATA)
    return home


def refused(folder, proto, place=in_graph):
    return refusal(written(folder / "model.onnx", place(proto)))


@pytest.mark.parametrize("entries", [{}, {"length": None}], ids=["length", "no length"])
@pytest.mark.parametrize("place", RUNNABLE)
def test_external_data_in_the_folder_load_and_run(folder, place, entries):
    path = written(folder / "model.onnx", place(tensor(**entries)))
    np.testing.assert_array_equal(run(path, x=W)[0], W + W)


@pytest.mark.parametrize("location", ["sub/w.bin", "./w.bin"])
def test_external_data_may_be_in_a_folder_below(folder, location):
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(DATA)
    path = written(folder / "model.onnx", in_graph(tensor(location)))
    np.testing.assert_array_equal(run(path, x=W)[0], W + W)


def test_initializers_are_read_from_their_file(folder):
    path = written(folder / "model.onnx", in_graph(tensor()))
    assert [(name, value.tolist()) for name, value in initializers(read(path))] == [("w", W.tolist())]


def test_external_data_without_an_offset_begin_at_the_first_byte(folder):
    (folder / "w.bin").write_bytes(W.tobytes())
    path = written(folder / "model.onnx", in_graph(tensor(offset=None, length=None)))
    np.testing.assert_array_equal(run(path, x=W)[0], W + W)


@pytest.mark.parametrize("place", [*RUNNABLE, in_sparse])
def test_external_data_above_the_folder_are_refused_wherever_they_are_used(folder, place):
    assert refused(folder, tensor("../secret.bin"), place) == (
        "GC902 FILE: the external data of 'w' are at '../secret.bin', outside its folder. Put them beside the file."
    )


@pytest.mark.parametrize("location", ["sub/../../secret.bin", r"..\secret.bin", "sub/../w.bin"])
def test_dots_in_a_path_are_refused(folder, location):
    (folder / "sub").mkdir()
    assert refused(folder, tensor(location)) == (
        f"GC902 FILE: the external data of 'w' are at {location!r}, outside its folder. Put them beside the file."
    )


@pytest.mark.parametrize("location", ["/etc/passwd", r"C:\secret.bin", r"\\host\share\w.bin"])
def test_an_absolute_path_is_refused(folder, location):
    assert refused(folder, tensor(location)) == (
        f"GC902 FILE: the external data of 'w' are at the absolute path {location!r}. Put them beside the file."
    )


def test_an_absolute_path_of_the_folder_itself_is_refused(folder):
    location = str(folder / "w.bin")
    assert "GC902 FILE: the external data of 'w' are at the absolute path" in refused(folder, tensor(location))


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    assert refused(folder, tensor("link.bin")) == (
        "GC902 FILE: the external data of 'w' are at 'link.bin', a link out of its folder. Copy them beside the file."
    )


def test_a_linked_folder_is_refused(folder):
    (folder / "sub").symlink_to(folder.parent)
    assert refused(folder, tensor("sub/secret.bin")) == (
        "GC902 FILE: the external data of 'w' are at 'sub/secret.bin', a link out of its folder. "
        "Copy them beside the file."
    )


def test_a_link_within_the_folder_is_refused_as_the_checker_does(folder):
    (folder / "link.bin").symlink_to("w.bin")
    assert refused(folder, tensor("link.bin")) == (
        "GC902 FILE: the external data of 'w' are at 'link.bin', a symbolic link. Copy them beside the file."
    )
    with pytest.raises(onnx.checker.ValidationError, match="symbolic link"):
        onnx.checker.check_model(folder / "model.onnx")


def test_a_link_to_a_device_is_refused(folder):
    (folder / "link.bin").symlink_to("/dev/zero")
    assert refused(folder, tensor("link.bin")) == (
        "GC902 FILE: the external data of 'w' are at 'link.bin', a link out of its folder. Copy them beside the file."
    )


def test_a_device_by_its_path_is_refused(folder):
    assert refused(folder, tensor("/dev/zero")) == (
        "GC902 FILE: the external data of 'w' are at the absolute path '/dev/zero'. Put them beside the file."
    )


def test_a_second_hard_link_is_refused(folder):
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    assert refused(folder, tensor("hard.bin")) == (
        "GC902 FILE: the external data of 'w' are in 'hard.bin', which has 2 hard links: it may be a file of another "
        "folder. Copy it."
    )


def test_the_folder_itself_may_be_behind_a_link(folder):
    written(folder / "model.onnx", in_graph(tensor()))
    (folder.parent / "other").symlink_to(folder)
    np.testing.assert_array_equal(run(folder.parent / "other" / "model.onnx", x=W)[0], W + W)


def test_data_that_are_not_there(folder):
    assert refused(folder, tensor("v.bin")) == (
        "GC142 FILE: the external data of 'w' are in 'FOLDER/v.bin', which is not there. Copy it beside the model."
    )


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "pipe"])
def test_data_that_are_no_plain_file(folder, make):
    make(folder / "v.bin")
    assert refused(folder, tensor("v.bin")) == (
        "GC142 FILE: the external data of 'w' are in 'FOLDER/v.bin', which is no plain file. Copy it beside the model."
    )


def test_a_name_that_no_file_can_have(folder):
    assert refused(folder, tensor("w" * 300)) == (
        "GC142 FILE: the external data of 'w' cannot be read: File name too long."
    )


@pytest.mark.parametrize("location", [None, "", "w\0.bin"], ids=["none", "empty", "zero byte"])
def test_data_without_a_file_name(folder, location):
    assert refused(folder, tensor(location)) == (
        "GC601 FILE: the external data of 'w' have no file name as their location. Write the file again."
    )


@pytest.mark.parametrize(
    ("entries", "begin", "end"),
    [
        ({"offset": AT + 1}, AT + 1, AT + 25),
        ({"offset": 10**6}, 10**6, 10**6 + 24),
        ({"offset": 2**70}, 2**70, 2**70 + 24),
        ({"offset": -8}, -8, 16),
        ({"length": -24}, AT, AT - 24),
        ({"offset": 40, "length": None}, 40, 64),
    ],
    ids=["one byte too far", "beyond the end", "beyond 64 bits", "negative offset", "negative length", "no length"],
)
def test_a_range_that_is_not_in_the_file(folder, entries, begin, end):
    assert refused(folder, tensor(**entries)) == (
        f"GC142 FILE: the external data of 'w' are bytes {begin} to {end} of 'w.bin', which has {len(DATA)}. "
        "Write or copy it again."
    )


@pytest.mark.parametrize("length", [20, 28])
def test_a_length_that_is_not_that_of_the_tensor(folder, length):
    assert refused(folder, tensor(offset=0, length=length)) == (
        f"GC601 FILE: the external data of 'w' have {length} bytes, and [2, 3] takes 24. Write the file again."
    )


def test_data_without_a_length_go_to_the_end_of_their_file(folder):
    (folder / "w.bin").write_bytes(DATA + DATA)
    assert refused(folder, tensor(length=None)) == (
        "GC601 FILE: the external data of 'w' have 56 bytes, and [2, 3] takes 24. Write the file again."
    )


def test_strings_are_in_no_other_file(folder):
    proto = tensor()
    proto.data_type = onnx.TensorProto.STRING
    assert refused(folder, proto) == (
        "GC601 FILE: the external data of 'w' are of string, which no file holds. Write the file again."
    )


@pytest.mark.parametrize("value", ["eight", "", "1" * 5000])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_an_offset_that_is_no_number(folder, key, value):
    assert refused(folder, tensor(**{key: value})) == (
        f"GC601 FILE: the external data of 'w' have the {key} {value[:40]!r}, which is no number. Write the file again."
    )


def test_an_address_in_memory_is_no_location(folder):
    """onnxruntime marks weights that lie in its memory by a name that a file could have."""
    marker = folder / "*" / "_ORT_MEM_ADDR_"
    marker.mkdir(parents=True)
    (marker / "*").write_bytes(DATA)
    path = written(folder / "model.onnx", in_graph(tensor("*/_ORT_MEM_ADDR_/*")))
    assert "which is not allowed in a model protobuf" in refusal(path, lambda file: session(read(file)))


def test_parsing_looks_at_no_external_data(folder):
    path = written(folder / "model.onnx", in_graph(tensor("../secret.bin")))
    assert [each.name for each in parse(path).model.graph.initializer] == ["w"]


# ------------------------------------------------------------------ names of types


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("FLOAT", "float32"), ("DOUBLE", "float64"), ("FLOAT16", "float16"), ("BFLOAT16", "bfloat16"), ("INT64", "int64")],
)
def test_a_dtype_has_the_name_that_torch_gives_it(dtype, name):
    assert onnx_dtype_name(getattr(onnx.TensorProto, dtype)) == name
    assert isinstance(getattr(torch, name), torch.dtype)


def test_a_dtype_of_no_known_number():
    assert onnx_dtype_name(99) == "type 99"


def test_initializers_of_types_that_torch_does_not_have_are_left_out(tmp_path):
    model = graph(RELU)
    model.graph.initializer.append(onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [1], [b"a"]))
    model.graph.initializer.append(onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.0]))
    path = written(tmp_path / "model.onnx", model)
    assert [(name, value.tolist()) for name, value in initializers(parse(path))] == [("v", [2.0])]


def test_an_initializer_is_a_default_and_no_input(tmp_path):
    model = graph("g (float[3] x, float[3] b) => (float[3] y) { y = Add(x, b) }")
    model.graph.initializer.append(onnx.helper.make_tensor("b", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))
    path = written(tmp_path / "model.onnx", model)
    assert [each.name for each in read(path).inputs] == ["x"]
