"""Two ONNX files: the same where only the order of sums differs, and different where a number does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gradctl.commands.compare_files import compare_files
from gradctl.core.allows import Allows
from gradctl.core.errors import TargetError

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def written(path, nodes, weights, *, inputs=None, outputs=None, opset=18):
    """Write a graph from ``x`` of [n, 16] to ``y``, or with these inputs and outputs, as (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs or [("x", FLOAT, ["n", 16])]],
        [helper.make_tensor_value_info(*each) for each in outputs or [("y", FLOAT, ["n", "m"])]],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, V, B = weights(16, 32), weights(32, 8, seed=1), weights(32, seed=2)
TWO_LAYERS = [
    node("MatMul", "x w", "h"),
    node("Add", "h b", "hb"),
    node("Relu", "hb", "r"),
    node("MatMul", "r v", "y"),
]


@pytest.fixture
def a(tmp_path):
    return written(tmp_path / "a.onnx", TWO_LAYERS, {"w": W, "v": V, "b": B})


def test_a_file_is_itself(a):
    unit = compare_files(a, a)
    assert (unit.verdict, unit.findings, unit.reference) == ("pass", (), str(a))
    assert [(row.tensor, row.verdict, row.error) for row in unit.tensors] == [("y", "same", 0.0)]
    assert unit.variations == (
        "example", "seed", "flipped signs",
        "example, optimiser off", "seed, optimiser off", "flipped signs, optimiser off",
    )  # fmt: skip


def test_another_order_of_the_same_sums_is_the_same(a, tmp_path):
    """The sums over 16 and 32 run backwards: numpy says what that moves, and it is far from nothing."""
    b = written(
        tmp_path / "b.onnx",
        [
            node("Gather", "x backwards", "x2", axis=1),
            node("Gemm", "x2 w b", "h"),
            node("Relu", "h", "r"),
            node("MatMul", "r v", "y"),
        ],
        {"w": W[::-1].copy(), "v": V, "b": B, "backwards": np.arange(16)[::-1].copy()},
    )
    unit = compare_files(a, b)
    assert unit.verdict == "pass"
    assert 0 < unit.tensors[0].error < unit.tensors[0].budget < 1e-4


def changed(array, factor):
    array = array.copy()
    array *= factor
    return array


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        (TWO_LAYERS, {"w": changed(W, 1.001), "v": V, "b": B}),
        (TWO_LAYERS, {"w": W, "v": V, "b": B + np.float32(1e-3)}),
        ([*TWO_LAYERS[:2], node("LeakyRelu", "hb", "r", alpha=1e-3), TWO_LAYERS[3]], {"w": W, "v": V, "b": B}),
        ([*TWO_LAYERS[:2], node("Clip", "hb zero most", "r"), TWO_LAYERS[3]],
         {"w": W, "v": V, "b": B, "zero": np.float32(0), "most": np.float32(3)}),
    ],
    ids=["a weight off by 1e-3", "a bias off by 1e-3", "a leaking relu", "a clip that is seldom reached"],
)  # fmt: skip
def test_another_number_differs(a, tmp_path, nodes, values):
    unit = compare_files(a, written(tmp_path / "b.onnx", nodes, values))
    (found,) = unit.findings
    assert (unit.verdict, found.code, found.tensor, found.allow) == ("fail", "GC301", "y", "GC301:y")
    assert found.message.startswith(f"y of {tmp_path / 'b.onnx'} differs from {a}'s")


def test_a_difference_that_is_meant_is_allowed(a, tmp_path):
    b = written(tmp_path / "b.onnx", TWO_LAYERS, {"w": changed(W, 1.001), "v": V, "b": B})
    unit = compare_files(a, b, allows=Allows(("GC301:y",)))
    assert (unit.verdict, [each.allowed for each in unit.findings]) == ("pass", [True])


def test_a_difference_on_negative_inputs_only_is_found(tmp_path):
    x = tmp_path / "x.npz"
    np.savez(x, x=np.abs(weights(4, 16)))
    a = written(tmp_path / "a.onnx", [node("Abs", "x", "y")], {})
    b = written(tmp_path / "b.onnx", [node("Identity", "x", "y")], {})
    unit = compare_files(a, b, inputs=x)
    assert (unit.verdict, unit.findings[0].message.count("with flipped signs")) == ("fail", 1)


def test_names_may_differ_where_the_order_is_the_same(a, tmp_path):
    renamed = [node("MatMul", "other w", "h"), *TWO_LAYERS[1:3], node("MatMul", "r v", "z")]
    b = written(
        tmp_path / "b.onnx", renamed, {"w": W, "v": V, "b": B},
        inputs=[("other", FLOAT, ["n", 16])], outputs=[("z", FLOAT, ["n", "m"])],
    )  # fmt: skip
    assert compare_files(a, b).verdict == "pass"


def test_ports_that_do_not_fit_are_listed(a, tmp_path):
    b = written(
        tmp_path / "b.onnx", [node("Cast", "x", "y", to=FLOAT), node("Identity", "x", "z")], {},
        inputs=[("x", INT64, [4, 8])], outputs=[("y", FLOAT, [4, 8]), ("z", INT64, [4, 8])],
    )  # fmt: skip
    with pytest.raises(TargetError) as caught:
        compare_files(a, b)
    assert caught.value.message == (
        f"{b} is not interchangeable with {a}: input x is int64[4, 8], not float32[n, 16]; 2 outputs (y, z), not 1 (y)."
    )


def test_an_index_that_one_rounding_moves_is_left_open(tmp_path):
    """The larger of a sum and the same sum backwards: which one it is hangs on the order of additions."""

    def largest(first, second):
        return [
            node("Gather", "x backwards", "turned", axis=1),
            node("MatMul", f"{first} {'w' if first == 'x' else 'turned_w'}", "s"),
            node("MatMul", f"{second} {'w' if second == 'x' else 'turned_w'}", "t"),
            node("Concat", "s t", "both", axis=1),
            node("ArgMax", "both", "y", axis=1, keepdims=0),
        ]  # fmt: skip

    column = weights(16, 1)
    values = {"w": column, "turned_w": column[::-1].copy(), "backwards": np.arange(16)[::-1].copy()}
    many = [("x", FLOAT, [64, 16])]
    a = written(tmp_path / "a.onnx", largest("x", "turned"), values, inputs=many, outputs=[("y", INT64, [64])])
    b = written(tmp_path / "b.onnx", largest("turned", "x"), values, inputs=many, outputs=[("y", INT64, [64])])
    unit = compare_files(a, b)
    assert (unit.verdict, [row.verdict for row in unit.tensors]) == ("inconclusive", ["unresolved"])


def test_integers_for_an_embedding_are_drawn_so_that_it_runs(tmp_path):
    a = written(
        tmp_path / "a.onnx", [node("Gather", "table ids", "y")], {"table": weights(7, 4)},
        inputs=[("ids", INT64, ["batch", "length"])], outputs=[("y", FLOAT, ["batch", "length", 4])],
    )  # fmt: skip
    assert compare_files(a, a).verdict == "pass"


def test_data_sets_of_onnx_are_inputs(a, tmp_path):
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    x = weights(5, 16, seed=9)
    (folder / "input_0.pb").write_bytes(numpy_helper.from_array(x, "x").SerializeToString())
    for inputs in (folder, folder / "input_0.pb"):
        assert compare_files(a, a, inputs=inputs).tensors[0].shape == (5, 8)


def test_inputs_that_do_not_fit_are_named(a, tmp_path):
    np.savez(tmp_path / "x.npz", z=weights(5, 16), q=weights(1))
    with pytest.raises(TargetError) as caught:
        compare_files(a, a, inputs=tmp_path / "x.npz")
    assert caught.value.message == f"{tmp_path / 'x.npz'} has z, q; {a} takes x."


def test_a_file_that_runs_on_no_drawn_input_asks_for_some(tmp_path):
    a = written(
        tmp_path / "a.onnx", [node("Reshape", "x shape", "y")], {"shape": np.array([5, 16])},
    )  # fmt: skip
    with pytest.raises(TargetError, match="runs on no inputs that were drawn for it .*; pass some with --inputs"):
        compare_files(a, a)
    torch.save({"x": torch.randn(5, 16)}, tmp_path / "x.pt")
    assert compare_files(a, a, inputs=tmp_path / "x.pt").verdict == "pass"


def test_half_precision_is_judged_by_its_own_rounding(tmp_path):
    half = [
        node("Cast", "x", "h", to=TensorProto.FLOAT16),
        *[node("MatMul", "h w", "m")],
        node("Cast", "m", "y", to=FLOAT),
    ]
    a = written(tmp_path / "a.onnx", half, {"w": W.astype(np.float16)})
    b = written(tmp_path / "b.onnx", half, {"w": changed(W, 1.1).astype(np.float16)})
    assert compare_files(a, a).verdict == "pass"
    assert compare_files(a, b).verdict == "fail"


def test_the_graphs_are_told_and_do_not_fail(a, tmp_path):
    fused = [node("Gemm", "x w b", "hb"), *TWO_LAYERS[2:]]
    b = written(tmp_path / "b.onnx", fused, {"w": W, "v": V, "b": B}, opset=20)
    unit = compare_files(a, b, fail_on="note")
    assert (unit.verdict, unit.findings) == ("pass", ())
    (change,) = unit.structure.changes
    operators = [[each.operator for each in side] for side in (change.before, change.after)]
    assert (change.kind, operators) == ("fused", [["MatMul", "Add"], ["Gemm"]])
    assert [(each.what, each.before, each.after) for each in unit.structure.model] == [("opset ai.onnx", "18", "20")]


DEEP = [
    helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
    helper.make_node("Relu", ["h"], ["r"], "second"),
    helper.make_node("MatMul", ["r", "v"], ["y"], "third"),
]


@pytest.mark.parametrize("plain", [True, False], ids=["same names", "other names"])
def test_the_first_value_that_differs_is_named_with_both_nodes(plain, tmp_path):
    a = written(tmp_path / "a.onnx", DEEP, {"w": W, "v": V})
    names = {"h": "r", "r": "h", "first": "other", "second": "another"} if not plain else {}
    deep = [
        helper.make_node(
            each.op_type,
            [names.get(name, name) for name in each.input],
            [names.get(name, name) for name in each.output],
            names.get(each.name, each.name),
        )
        for each in DEEP
    ]
    wrong = W.copy()
    wrong[3, 5] += 1.0
    b = written(tmp_path / "b.onnx", deep, {"w": wrong, "v": V})
    (finding,) = compare_files(a, b).findings
    said = finding.message.partition(" The first value that differs, ")[2]
    if plain:
        assert said.startswith("h, is off by ") and said.endswith(": MatMul 'first' makes it.")
        assert str(finding.location) == f"{b}, MatMul 'first'"
    else:
        assert said.startswith(f"h (r in {b}), is off by ")
        assert said.endswith(": MatMul 'first' there, MatMul 'other' here makes it.")
        assert str(finding.location) == f"{b}, MatMul 'other'"


def test_no_inner_value_is_named_where_only_the_output_differs(tmp_path):
    a = written(tmp_path / "a.onnx", DEEP, {"w": W, "v": V})
    b = written(tmp_path / "b.onnx", DEEP, {"w": W, "v": changed(V, 1.1)})
    (finding,) = compare_files(a, b).findings
    assert "first value" not in finding.message
    assert finding.location is None


def test_a_removed_node_is_where_values_part(tmp_path):
    a = written(tmp_path / "a.onnx", DEEP, {"w": W, "v": V})
    b = written(tmp_path / "b.onnx", [DEEP[0], node("MatMul", "h v", "y")], {"w": W, "v": V})
    unit = compare_files(a, b)
    assert [(each.kind, each.before[0].name) for each in unit.structure.changes] == [("removed", "second")]
    (finding,) = unit.findings
    assert f"r (h in {b})" in finding.message
    assert finding.message.endswith("Relu 'second' there, MatMul 'first' here makes it.")


def test_values_of_files_with_external_data_are_compared_too(tmp_path):
    files = []
    for name, weight in (("a", W), ("b", changed(W, 1.1))):
        path = written(tmp_path / f"{name}.onnx", DEEP, {"w": weight, "v": V})
        onnx.save(
            onnx.load(path), path, save_as_external_data=True, location=f"{name}.data", size_threshold=0
        )  # fmt: skip
        files.append(path)
    (finding,) = compare_files(*files).findings
    assert finding.location.op == "MatMul 'first'"
