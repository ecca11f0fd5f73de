"""Two graphs: nothing is said where only names and order differ, and one change is named as what it is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from gradctl.graphdiff.graph_difference import compare_structure
from gradctl.onnxio.onnx_file import OnnxFile, read
from gradctl.onnxio.submodel import select_outputs
from tests.passes.random_graphs import RandomNode, drawn, file_of, renamed

SEEDS = range(60)


def structure(a, b):
    return compare_structure(a, b).structure


def compared(one, other, folder):
    return structure(read(file_of(one, folder / "a.onnx")), read(file_of(other, folder / "b.onnx")))


def model(text, constants=None):
    """Return a graph of floats from its text."""
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20, "own" : 1]> {text}')
    parsed.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
    return OnnxFile(Path("model.onnx"), parsed)


def said(found):
    """Return each change as its kind and the operators before and after."""
    return [
        (change.kind, [node.operator for node in change.before], [node.operator for node in change.after])
        for change in found.changes
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_other_names_and_another_order_are_no_difference(seed, tmp_path):
    graph = drawn(seed)
    found = compared(graph, renamed(graph, seed), tmp_path)
    assert (found.changes, found.initializers, found.model) == ((), (), ())
    assert found.matched == found.nodes_before == len(graph.nodes)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_that_all_changed_leave_the_graph_the_same_under_other_names(seed, tmp_path):
    graph = drawn(seed)
    trained = replace(graph, constants={name: value + 1 for name, value in graph.constants.items()})
    found = compared(graph, renamed(trained, seed), tmp_path)
    assert (found.changes, found.matched) == ((), len(graph.nodes))
    assert sorted(each.name for each in found.initializers) == sorted(graph.constants)
    assert all(each.max_abs == pytest.approx(1.0, rel=1e-6) for each in found.initializers)


def planted_attribute(graph, source):
    places = [place for place, node in enumerate(graph.nodes) if node.attributes]
    place = source.choice(places)
    node = graph.nodes[place]
    name, value = node.attributes[0]
    other = {"alpha": 0.7, "axis": 1 - value}[name]
    return graph.with_node(place, replace(node, attributes=((name, other),))), (node, name, value, other)


def planted_entry(graph, source):
    name = source.choice(list(graph.constants))
    value = graph.constants[name].copy()
    value[1, 2] += 0.5
    return replace(graph, constants=graph.constants | {name: value}), (name, graph.constants[name])


def planted_swap(graph, source):
    places = [place for place, node in enumerate(graph.nodes) if len(set(node.inputs)) == 2]
    place = source.choice(places)
    node = graph.nodes[place]
    return graph.with_node(place, replace(node, inputs=node.inputs[::-1])), node


def planted_removal(graph, source):
    """Let those who take a value take its maker's input instead; of equal nodes in a row any may be the one."""
    kinds = {node.output: (node.operator, node.attributes) for node in graph.nodes}
    in_a_row = {name for node in graph.nodes for name in node.inputs if kinds.get(name) == kinds[node.output]}
    in_a_row |= {node.output for node in graph.nodes if in_a_row.intersection(node.inputs)}
    places = [
        place
        for place, node in enumerate(graph.nodes)
        if node.output not in (*graph.outputs, *in_a_row) and len(node.inputs) == 1
    ]
    place = source.choice(places)
    node = graph.nodes[place]
    nodes = tuple(
        replace(each, inputs=tuple(node.inputs[0] if name == node.output else name for name in each.inputs))
        for each in graph.nodes
        if each is not node
    )
    return replace(graph, nodes=nodes), node


def planted_insertion(graph, source):
    """Put a node before one input of another."""
    place = source.randrange(len(graph.nodes))
    node = graph.nodes[place]
    slot = source.randrange(len(node.inputs))
    new = RandomNode("new", source.choice(("Relu", "Abs", "Tanh")), (node.inputs[slot],), "new_value")
    inputs = (*node.inputs[:slot], "new_value", *node.inputs[slot + 1 :])
    nodes = (*graph.nodes[:place], new, replace(node, inputs=inputs), *graph.nodes[place + 1 :])
    return replace(graph, nodes=nodes), new


def cases(plant):
    """Give graphs, each with one change, as it is and with other names; and what was changed."""
    for seed in SEEDS:
        graph = drawn(seed)
        try:
            other, what = plant(graph, random.Random(seed))
        except IndexError:  # nothing to choose from
            continue
        yield graph, other, what
        yield graph, renamed(other, seed), what


def test_a_changed_attribute_is_named_with_both_values(tmp_path):
    for graph, other, (node, name, old, new) in cases(planted_attribute):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, change.before[0].name) for change in found.changes] == [("attributes", node.name)]
        (difference,) = found.changes[0].differences
        assert (difference.what, difference.before, difference.after) == (name, f"{old:.6g}", f"{new:.6g}")
        assert found.initializers == ()


def test_a_changed_entry_is_named_with_its_size(tmp_path):
    for graph, other, (name, old) in cases(planted_entry):
        found = compared(graph, other, tmp_path)
        assert found.changes == ()
        (change,) = found.initializers
        assert (change.kind, change.name, change.type_before) == ("changed", name, "float32[4, 4]")
        assert change.max_abs == pytest.approx(0.5, rel=1e-5)
        assert change.error == pytest.approx(0.5 / np.linalg.norm(old.astype(np.float64)), rel=1e-5)


def test_swapped_inputs_are_named(tmp_path):
    for graph, other, node in cases(planted_swap):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, change.before[0].name) for change in found.changes] == [("rewired", node.name)]
        differences = [(each.what, each.before) for each in found.changes[0].differences]
        assert differences == [("input 0", node.inputs[0]), ("input 1", node.inputs[1])]
        assert found.initializers == ()


def test_a_removed_node_is_named(tmp_path):
    for graph, other, node in cases(planted_removal):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, [each.name for each in change.before]) for change in found.changes] == [
            ("removed", [node.name])
        ]
        assert (found.changes[0].after, found.initializers) == ((), ())


def test_an_inserted_node_is_named(tmp_path):
    for graph, other, node in cases(planted_insertion):
        found = compared(graph, other, tmp_path)
        assert [(change.kind, [each.operator for each in change.after]) for change in found.changes] == [
            ("added", [node.operator])
        ]
        assert (found.changes[0].before, found.initializers) == ((), ())


def of_constants(**shapes):
    """Return random constants of these shapes."""
    source = np.random.default_rng(0)
    return {name: source.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


LINEAR = of_constants(w=(4, 4), b=(4,), v=(4, 4), c=(4,))
NORM = of_constants(scale=(4,), bias=(4,)) | {"two": np.float32(2), "eps": np.float32(1e-5), "axis": np.array([-1])}
X_TO_Y = "g (float[4, 4] x) => (float[4, 4] y)"

# Each row: what is before, what is after, the constants of both, and what is said of it. Read the other way round a
# fused node is a split one.
REWRITES = {
    "linear": (
        "h = MatMul(x, w)  i = Add(h, b)  r = Relu(i)  k = MatMul(r, v)  y = Add(k, c)",
        "i = Gemm(x, w, b)  r = Relu(i)  y = Gemm(r, v, c)",
        LINEAR,
        [("fused", ["MatMul", "Add"], ["Gemm"])] * 2,
    ),
    "linear, other names": (
        "h = MatMul(x, w)  i = Add(h, b)  r = Relu(i)  k = MatMul(r, v)  y = Add(k, c)",
        "r = Gemm(x, w, b)  k = Relu(r)  y = Gemm(k, v, c)",
        LINEAR,
        [("fused", ["MatMul", "Add"], ["Gemm"])] * 2,
    ),
    "linear, one after the other": (
        "h = MatMul(x, w)  i = Add(h, b)  k = MatMul(i, v)  y = Add(k, c)",
        "i = Gemm(x, w, b)  y = Gemm(i, v, c)",
        LINEAR,
        [("fused", ["MatMul", "Add"], ["Gemm"])] * 2,
    ),
    "linear, one after the other, other names": (
        "h = MatMul(x, w)  i = Add(h, b)  k = MatMul(i, v)  y = Add(k, c)",
        "h = Gemm(x, w, b)  y = Gemm(h, v, c)",
        LINEAR,
        [("fused", ["MatMul", "Add"], ["Gemm"])] * 2,
    ),
    "layer norm": (
        "m = ReduceMean(x, axis)  d = Sub(x, m)  s = Pow(d, two)  q = ReduceMean(s, axis)  e = Add(q, eps) "
        "r = Sqrt(e)  n = Div(d, r)  t = Mul(n, scale)  u = Add(t, bias)  y = Relu(u)",
        "l = LayerNormalization<axis = -1>(x, scale, bias)  y = Relu(l)",
        NORM,
        [
            (
                "fused",
                ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"],
                ["LayerNormalization"],
            )
        ],
    ),
    "transposes": (
        "t = Transpose<perm = [1, 0]>(x)  u = Transpose<perm = [1, 0]>(t)  y = Relu(u)",
        "y = Relu(x)",
        {},
        [("removed", ["Transpose", "Transpose"], [])],
    ),
    "transpose into Gemm": (
        "t = Transpose<perm = [1, 0]>(x)  y = Gemm(t, w, b)",
        "y = Gemm<transA = 1>(x, w, b)",
        LINEAR,
        [("fused", ["Transpose", "Gemm"], ["Gemm"])],
    ),
    "another activation": (
        "h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)",
        "h = MatMul(x, w)  r = Elu(h)  y = MatMul(r, v)",
        LINEAR,
        [("replaced", ["Relu"], ["Elu"])],
    ),
    "a constant computed beforehand": (
        "t = Transpose(w)  u = Neg(t)  y = MatMul(x, u)",
        "y = MatMul(x, folded)",
        LINEAR | {"folded": -LINEAR["w"].T},
        [("folded", ["Transpose", "Neg"], [])],
    ),
    "one of two equal nodes": (
        "r = Relu(x)  s = Relu(x)  t = Neg(r)  u = Exp(s)  y = Add(t, u)",
        "r = Relu(x)  t = Neg(r)  u = Exp(r)  y = Add(t, u)",
        {},
        [("merged", ["Relu"], [])],
    ),
}


@pytest.mark.parametrize("row", REWRITES)
def test_what_optimisers_do_has_its_name(row):
    before, after, constants, expected = REWRITES[row]
    a, b = (model(f"{X_TO_Y} {{ {text} }}", constants) for text in (before, after))
    assert said(structure(a, b)) == expected
    other = {"fused": "split", "removed": "added", "folded": "added", "merged": "added"}
    assert said(structure(b, a)) == [(other.get(kind, kind), right, left) for kind, left, right in expected]


@pytest.mark.parametrize("row", [row for row in REWRITES if row != "another activation"])
def test_values_that_are_said_to_be_shared_are_equal(row):
    before, after, constants, _ = REWRITES[row]
    a, b = (model(f"{X_TO_Y} {{ {text} }}", constants) for text in (before, after))
    shared = compare_structure(a, b).values
    assert any(value.before == "y" for value in shared)
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)}
    for value in shared:
        mine, theirs = (
            ReferenceEvaluator(select_outputs(file.model, [name])).run(None, feeds)[0]
            for file, name in ((a, value.before), (b, value.after))
        )
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)  # some 10 roundings of values around 1


def test_batch_norm_went_into_the_convolution():
    constants = of_constants(w=(4, 3, 3, 3), s=(4,), t=(4,), m=(4,)) | {"v": np.ones(4, np.float32)}
    image = "g (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y)"
    a = model(f"{image} {{ c = Conv(x, w)  n = BatchNormalization(c, s, t, m, v)  y = Relu(n) }}", constants)
    folded = {"w": constants["w"] * 2, "b": constants["t"]}
    for value in ("c", "n"):
        b = model(f"{image} {{ {value} = Conv(x, w, b)  y = Relu({value}) }}", folded)
        found = structure(a, b)
        assert said(found) == [("fused", ["Conv", "BatchNormalization"], ["Conv"])]
        changed = [(each.kind, each.name, each.error, each.max_abs) for each in found.initializers]
        assert changed[0] == ("changed", "w", pytest.approx(1.0), pytest.approx(np.abs(constants["w"]).max()))


def test_what_computes_nothing_is_only_counted():
    a = model(f"{X_TO_Y} {{ h = MatMul(x, w)  y = Relu(h) }}", {"w": LINEAR["w"]})
    b = model(f"{X_TO_Y} {{ i = Identity(x)  h = MatMul(i, w)  j = Identity(h)  r = Relu(j)  y = Identity(r) }}")
    b.model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=a.model.graph.initializer[0]))
    found = structure(a, b)
    assert (found.changes, found.initializers, found.model) == ((), (), ())
    assert (found.operators_after["Identity"], found.operators_after["Constant"], found.moved) == (3, 1, 1)


def test_a_default_that_is_spelled_out_is_no_difference():
    a = model(f"{X_TO_Y} {{ y = Gemm(x, w, b) }}", LINEAR)
    b = model(f"{X_TO_Y} {{ y = Gemm<alpha = 1.0, transA = 0>(x, w, b) }}", LINEAR)
    c = model(f"{X_TO_Y} {{ y = Gemm<alpha = 2.0>(x, w, b) }}", LINEAR)
    assert structure(a, b).changes == ()
    ((difference,),) = [change.differences for change in structure(a, c).changes]
    assert (difference.what, difference.before, difference.after) == ("alpha", "1", "2")


def test_another_weight_is_another_wire_and_other_values_are_no_wire():
    a = model(f"{X_TO_Y} {{ h = MatMul(x, w)  y = MatMul(h, v) }}", {"w": LINEAR["w"], "v": LINEAR["v"]})
    crossed = model(f"{X_TO_Y} {{ h = MatMul(x, v)  y = MatMul(h, w) }}", {"w": LINEAR["w"], "v": LINEAR["v"]})
    exchanged = model(f"{X_TO_Y} {{ h = MatMul(x, w)  y = MatMul(h, v) }}", {"w": LINEAR["v"], "v": LINEAR["w"]})
    found = structure(a, crossed)
    assert said(found) == [("rewired", ["MatMul"], ["MatMul"])] * 2
    assert found.initializers == ()
    found = structure(a, exchanged)
    assert found.changes == ()
    assert sorted((each.kind, each.name) for each in found.initializers) == [("changed", "v"), ("changed", "w")]


def test_an_initializer_of_another_type_is_told_with_both():
    a = model(f"{X_TO_Y} {{ y = MatMul(x, w) }}", {"w": LINEAR["w"]})
    b = model(f"{X_TO_Y} {{ y = MatMul(x, w) }}", {"w": LINEAR["w"][:, :1].astype(np.float64)})
    (change,) = structure(a, b).initializers
    assert (change.type_before, change.type_after, change.error) == ("float32[4, 4]", "float64[4, 1]", None)


BRANCHES = """
{ c = Greater(x, zero)  d = ReduceMax(e)  h = Relu(x)
  y = If (d) <
    then_branch = t () => (float[4, 4] p) { q = Neg(h)  p = LeakyRelu<alpha = %s>(q) },
    else_branch = s () => (float[4, 4] p) { p = Exp(%s) }
  > }
"""


def branches(alpha="0.1", taken="h"):
    text = BRANCHES.replace("c = Greater(x, zero)  d = ReduceMax(e)", "d = Not(flag)") % (alpha, taken)
    return model(f"g (float[4, 4] x, bool flag) => (float[4, 4] y) {text}")


def test_branches_are_compared_from_within():
    a = branches()
    other = branches()
    for node in other.model.graph.node:
        for attribute in node.attribute:
            for inner in attribute.g.node:
                inner.input[:] = [{"h": "q", "q": "m"}.get(name, name) for name in inner.input]
                inner.output[:] = [{"q": "m"}.get(name, name) for name in inner.output]
        node.output[:] = [{"h": "q"}.get(name, name) for name in node.output]
    found = structure(a, other)
    assert (found.changes, found.matched) == ((), found.nodes_before)
    (change,) = structure(a, branches(alpha="0.5")).changes
    assert (change.kind, change.inside) == ("attributes", "then_branch of If y")
    assert [(each.what, each.before, each.after) for each in change.differences] == [("alpha", "0.1", "0.5")]
    (change,) = structure(a, branches(taken="x")).changes
    assert (change.kind, change.inside, change.before[0].operator) == ("rewired", "else_branch of If y", "Exp")


def test_functions_are_compared_by_name():
    text = """g (float[4, 4] x) => (float[4, 4] y) {{ y = own.act(x) }}
    <domain: "own", opset_import: ["" : 20]> act (p) => (q) {{ r = Neg(p)  q = {} }}"""
    a, b = model(text.format("Relu(r)")), model(text.format("Elu(r)"))
    assert structure(a, a).changes == ()
    (change,) = structure(a, b).changes
    assert (change.kind, change.inside) == ("replaced", "function own::act")


def test_the_model_around_the_graph_is_told():
    a = model("g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }")
    b = model("h (float[4, 4] x) => (double[4, 4] z) { z = Relu(x) }")
    b.model.opset_import[0].version, b.model.ir_version, b.model.producer_name = 18, 9, "someone"
    onnx.helper.set_model_props(b.model, {"author": "A"})
    assert [(each.what, each.before, each.after) for each in structure(a, b).model] == [
        ("input 0", "x float32[n, 4]", "x float32[4, 4]"),
        ("output 0", "y float32[n, 4]", "z float64[4, 4]"),
        ("opset ai.onnx", "20", "18"),
        ("ir_version", "10", "9"),
        ("graph name", "g", "h"),
        ("producer", None, "someone"),
        ("metadata author", None, "A"),
    ]


def test_long_texts_are_cut():
    a, b = model(f"{X_TO_Y} {{ y = Relu(x) }}"), model(f"{X_TO_Y} {{ y = Relu(x) }}")
    onnx.helper.set_model_props(b.model, {"blob": "a" * 10_000})
    ((_, _, after),) = [(each.what, each.before, each.after) for each in structure(a, b).model]
    assert after == "a" * 200 + "... (10000 characters)"


def test_external_data_are_read_where_they_lie(tmp_path):
    graph = drawn(3)
    file_of(graph, tmp_path / "a.onnx")
    other, (name, _) = planted_entry(graph, random.Random(0))
    onnx.save(
        onnx.load(file_of(other, tmp_path / "b.onnx")), tmp_path / "b.onnx",
        save_as_external_data=True, location="b.data", size_threshold=0,
    )  # fmt: skip
    found = structure(read(tmp_path / "a.onnx"), read(tmp_path / "b.onnx"))
    assert (found.changes, [each.name for each in found.initializers]) == ((), [name])


@pytest.mark.parametrize("kind", ["STRING", "BFLOAT16", "INT4", "BOOL", "COMPLEX64", "FLOAT8E4M3FN", "INT64"])
def test_constants_of_every_kind_are_compared(kind):
    number = getattr(onnx.TensorProto, kind)

    def one(*values):
        file = model("g (float[4] x) => (float[4] y) { y = Relu(x) }")
        values = [str(each).encode() for each in values] if kind == "STRING" else values
        file.model.graph.initializer.append(onnx.helper.make_tensor("c", number, [len(values)], values))
        return file

    assert structure(one(1, 0, 1), one(1, 0, 1)).initializers == ()
    (change,) = structure(one(1, 0, 1), one(1, 1, 1)).initializers
    assert (change.kind, change.max_abs) == ("changed", None if kind == "STRING" else 1.0)
    assert change.error == (None if kind == "STRING" else pytest.approx(2**-0.5))


@pytest.mark.parametrize("seed", range(20))
def test_graphs_that_have_nothing_to_do_with_each_other_are_told_apart_whole(seed, tmp_path):
    """Each node is matched or in one change, on either side."""
    one, other = drawn(seed), renamed(drawn(seed + 1000), seed)
    found = compared(one, other, tmp_path)
    apart = [change for change in found.changes if change.kind not in ("rewired", "attributes", "rewired, attributes")]
    before = [node.value for change in apart for node in change.before]
    after = [node.value for change in apart for node in change.after]
    assert len(set(before)) == len(before) == found.nodes_before - found.matched
    assert len(set(after)) == len(after) == found.nodes_after - found.matched


def test_loops_sequences_and_empty_graphs_are_read():
    loop = """g (float[4, 4] x) => (float[4, 4] y) { n = Constant<value_int = 3>()  t = Cast<to = 9>(n)
      y = Loop (n, t, x) <body = b (int64 i, bool c, float[4, 4] s) => (bool d, float[4, 4] r)
        { d = Identity(c)  r = %s(s, x) }> }"""
    sequence = (
        "g (float[4, 4] x) => (float[4, 4] y) { s = SequenceConstruct(x, x)  y = ConcatFromSequence<axis = 0>(s) }"
    )
    empty = "g (float[4, 4] x) => (float[4, 4] x) { }"
    files = [model(loop % "Add"), model(loop % "Sub"), model(sequence), model(empty)]
    for one in files:
        assert structure(one, one).changes == ()
        for other in files:
            assert structure(one, other).nodes_after == structure(other, one).nodes_before
    (change,) = structure(files[0], files[1]).changes
    assert (change.kind, change.inside) == ("replaced", "body of Loop y")


def test_attributes_of_functions_that_refer_to_their_caller():
    text = """g (float[4, 4] x) => (float[4, 4] y) { y = own.act<slope = 0.2>(x) }
    <domain: "own", opset_import: ["" : 20]> act <slope> (p) => (q)
    { c = Constant<value_float: float = @slope>()  r = Mul(p, c)  q = LeakyRelu<alpha: float = @slope>(r) }"""
    a, b = model(text), model(text.replace("LeakyRelu<alpha: float = @slope>", "LeakyRelu<alpha = 0.5>"))
    assert structure(a, a).changes == ()
    (change,) = structure(a, b).changes
    assert [(each.what, each.before, each.after) for each in change.differences] == [("alpha", "@slope", "0.5")]
