"""Passes over a graph: those that lie are undone and named, the right ones stay, and the result is what it was."""

from __future__ import annotations

import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gradctl.commands.optimize import Options, chosen_passes, optimize_file, optimize_target
from gradctl.comparison.timing import latencies
from gradctl.core.allows import Allows
from gradctl.core.errors import ResourceError, TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.onnxio.onnx_file import read
from gradctl.passes.pass_result import Pass
from gradctl.passes.table import PASSES, passes_of_level
from gradctl.subject.loading.load import load_subject
from tests.passes.planted import PLANTED, graph, normal, planted
from tests.sweeps import sampled

SAMPLES = ("linear", "mlp", "resnet", "transformer", "gru", "tied_weights", "no_grad_inside", "straight_through")
NAN = np.float32("nan")


def written(tmp_path, model, name="a.onnx"):
    onnx.save(model, tmp_path / name)
    return tmp_path / name


def values(path, seed):
    """Return the outputs of a file on inputs drawn here, onnxruntime's optimiser off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    running = onnxruntime.InferenceSession(path, options)
    draw = np.random.default_rng(seed)
    feeds = {each.name: draw.standard_normal(each.shape).astype(np.float32) for each in running.get_inputs()}
    return running.run(None, feeds)


def statuses(unit):
    return {each.name: each.status for each in unit.optimization.passes}


def around(row):
    return [PASSES["ir-identity"], planted(row), PASSES["onnxscript"]]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found_named_and_undone(name, tmp_path):
    row = PLANTED[name]
    path, output = written(tmp_path, graph(row.text, row.constants)), tmp_path / "b.onnx"
    optimized = optimize_file(path, output, Options(around(row), allows=Allows(["GC501:planted"])))
    unit = optimized.unit
    (finding,) = unit.findings
    assert (finding.code, finding.tensor, finding.allow) == ("GC501", "y", "GC501:planted")
    if row.value != "y":
        assert f"the first value it changes is {row.value} of " in finding.message
    assert statuses(unit)["planted"] == "undone"
    assert statuses(unit)["ir-identity"] == "kept"
    assert (unit.verdict, optimized.written) == ("pass", True)
    for seed in range(3):
        for before, after in zip(values(path, seed), values(output, seed), strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_the_right_passes_alone_are_silent_on_the_same_graphs(tmp_path):
    """The twin: all passes of the default level, and none of these graphs has a finding."""
    for number, row in enumerate(PLANTED.values()):
        path = written(tmp_path, graph(row.text, row.constants))
        unit = optimize_file(path, tmp_path / f"{number}.onnx", Options(passes_of_level("default"))).unit
        assert (unit.verdict, unit.findings) == ("pass", ())


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("a constant off by 1e-3", "1 of 3 nodes show it: Add."),
        ("swapped operands of Sub", "1 of 3 nodes show it: Sub."),
        ("a dropped Cast", "1 of 4 nodes show it: Cast."),
        ("a sum in another order of parts", "1 of 4 nodes show it: Concat."),
    ],
)
def test_the_fewest_nodes_that_show_a_bug_are_named(name, nodes, tmp_path):
    row = PLANTED[name]
    unit = optimize_file(
        written(tmp_path, graph(row.text, row.constants)), tmp_path / "b.onnx", Options(around(row))
    ).unit
    assert unit.findings[0].message.endswith(f"; {nodes} It was undone.")


def test_a_bug_behind_two_hundred_nodes_is_one_node(tmp_path):
    chain = "".join(f"h{k} = {'Tanh' if k % 2 else 'Neg'}({f'h{k - 1}' if k else 'i'})\n" for k in range(200))
    row = PLANTED["swapped operands of Sub"]
    text = chain + "d = Sub(h199, w)\n" + "e = Relu(d)\ny = Tanh(e)"
    unit = optimize_file(written(tmp_path, graph(text, row.constants)), tmp_path / "b.onnx", Options(around(row))).unit
    (finding,) = unit.findings
    assert "the first value it changes is d of Sub" in finding.message
    assert "; 1 of 203 nodes show it: Sub." in finding.message


def test_a_pass_that_is_wrong_only_together_is_shrunk_to_its_pattern(tmp_path):
    """A fusion of MatMul and Add that forgets the Add: both nodes show it, and neither alone."""

    def fused(model):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        makers = {node.output[0]: node for node in changed.graph.node}
        for node in list(changed.graph.node):
            product = makers.get(node.input[0]) if node.op_type == "Add" else None
            if product is not None and product.op_type == "MatMul":
                product.output[0] = node.output[0]
                changed.graph.node.remove(node)
        return changed

    text = "n = Neg(i)\nm = MatMul(n, w)\nh = Add(m, b)\ny = Tanh(h)"
    path = written(tmp_path, graph(text, {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}))
    passes = [Pass("fusion", None, "tests", "forgets", fused)]
    (finding,) = optimize_file(path, tmp_path / "b.onnx", Options(passes)).unit.findings
    assert finding.message.endswith("; 2 of 5 nodes show it: MatMul, Add. It was undone.")


def test_a_finding_leaves_the_old_file(tmp_path):
    row = PLANTED["a dropped bias"]
    output = written(tmp_path, graph("y = Neg(i)"), "b.onnx")
    before = output.read_bytes()
    optimized = optimize_file(written(tmp_path, graph(row.text, row.constants)), output, Options(around(row)))
    assert (optimized.unit.verdict, optimized.written, output.read_bytes()) == ("fail", False, before)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_file_is_replaced_by_its_own_result(tmp_path):
    path = written(tmp_path, graph("m = Identity(i)\ny = Relu(m)"))
    expected = values(path, 0)
    assert optimize_file(path, path, Options(passes_of_level("safe"))).written
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Relu"]
    np.testing.assert_array_equal(values(path, 0), expected)
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


def test_a_disk_that_takes_no_graph_leaves_the_old_file(tmp_path):
    output = written(tmp_path, graph("y = Neg(i)"), "b.onnx")
    path, old = written(tmp_path, graph("m = Identity(i)\ny = Relu(m)", {"w": normal(256, 4)})), output.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            optimize_file(path, output, Options(passes_of_level("safe")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"GC131 {str(output)!r} cannot be written: File too large. ")
    assert output.read_bytes() == old
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def raising(model):
    raise KeyError("scale")


def renamed(model):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.node[-1].output[0] = changed.graph.output[0].name = "z"
    return changed


def headless(model):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[0]
    return changed


def misshapen(model):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((3, 4), np.float32), "w"))
    return changed


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (raising, "pass bad (tests) was undone: it raises KeyError: 'scale'."),
        (renamed, "pass bad (tests) was undone: it has other inputs or outputs: output y, output z."),
        (headless, "pass bad (tests) was undone: ONNX's checker refuses it: Nodes in a graph must be "),
        (misshapen, "pass bad (tests) was undone: shapes do not fit: "),
    ],
)  # fmt: skip
def test_a_pass_that_fails_is_undone_and_the_others_go_on(apply, said, tmp_path):
    path = written(tmp_path, graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}))
    passes = [Pass("bad", "default", "tests", "fails", apply), PASSES["ir-identity"]]
    unit = optimize_file(path, tmp_path / "b.onnx", Options(passes)).unit
    (finding,) = unit.findings
    assert (finding.code, finding.allow) == ("GC502", "GC502:bad")
    assert finding.message.startswith(said)
    assert unit.verdict == ("pass" if apply is raising else "fail")  # it has made nothing that could be wrong
    assert statuses(unit) == {"bad": "failed", "ir-identity": "kept"}
    assert optimize_file(path, tmp_path / "b.onnx", Options(passes, allows=Allows(["GC502:bad"]))).written


def test_a_pass_that_makes_more_nodes_is_set_aside(tmp_path):
    def longer(model):
        changed = graph("m = MatMul(i, w)\nn = Neg(m)\nk = Neg(n)\ny = Relu(k)", {"w": np.eye(4, dtype=np.float32)})
        assert len(changed.graph.node) > len(model.graph.node)
        return changed

    path = written(tmp_path, graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}))
    (outcome,) = optimize_file(
        path, tmp_path / "b.onnx", Options([Pass("long", None, "tests", "grows", longer)])
    ).unit.optimization.passes
    assert (outcome.status, outcome.reason) == ("set aside", "it makes 5 nodes of 3")


def test_a_weight_that_is_kept_on_the_disk_is_verified_too(tmp_path):
    """From 1 MiB on weights lie beside the graphs in between; the result has them in it, and nothing else is left."""

    def scaled(model):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        wrong = onnx.numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1.001)
        changed.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(wrong, "w"))
        return changed

    weight = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    model = graph(
        "m = MatMul(i, w)\ny = Relu(m)", {"w": weight}, inputs="float[4, 512] x", outputs="float[4, 512] y"
    )  # fmt: skip
    passes = [Pass("scaled", None, "tests", "scales", scaled), PASSES["ir-identity"]]
    options = Options(passes, allows=Allows(["GC501:scaled"]))
    optimized = optimize_file(written(tmp_path, model), tmp_path / "b.onnx", options)
    assert statuses(optimized.unit) == {"scaled": "undone", "ir-identity": "kept"}
    assert "the first value it changes is initializer w of MatMul" in optimized.unit.findings[0].message
    (tensor,) = onnx.load(tmp_path / "b.onnx", load_external_data=False).graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weight)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def with_two_negations(before):
    """Negate the first value twice more."""
    changed = onnx.ModelProto()
    changed.CopyFrom(before)
    taken = changed.graph.node[0].output[0]
    changed.graph.node[0].output[0] = "start"
    for given, made in (("start", "middle"), ("middle", taken)):
        changed.graph.node.insert(1 + (given == "middle"), onnx.helper.make_node("Neg", [given], [made]))
    return changed


def without_negations(before):
    """Take out the first two negations that follow each other, and the Identity before them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(before)
    identity, first, second, *_ = changed.graph.node
    if [each.op_type for each in (identity, first, second)] != ["Identity", "Neg", "Neg"]:
        return changed
    first.op_type, first.input[0], first.output[0] = "Identity", identity.input[0], second.output[0]
    for node in (identity, second):
        changed.graph.node.remove(node)
    return changed


def test_a_pass_that_makes_more_nodes_is_kept_where_the_next_takes_them_out(tmp_path):
    path = written(tmp_path, graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}))
    passes = [
        Pass("long", None, "tests", "grows", with_two_negations),
        Pass("short", None, "tests", "shrinks", without_negations),
    ]
    table = optimize_file(path, tmp_path / "b.onnx", Options(passes)).unit.optimization
    assert [(each.status, each.size.nodes) for each in table.passes] == [("kept", 5), ("kept", 3)]
    assert table.after.operators == {"Identity": 1, "MatMul": 1, "Relu": 1}
    np.testing.assert_array_equal(values(tmp_path / "b.onnx", 0), values(path, 0))


def test_a_trial_that_brings_nothing_is_undone_and_the_others_run_without_it(tmp_path):
    path = written(tmp_path, graph("m = MatMul(i, w)\ny = Relu(m)", {"w": np.eye(4, dtype=np.float32)}))
    long = Pass("long", None, "tests", "grows", with_two_negations)
    others = [PASSES["ir-identity"], PASSES["fold"]]
    tried = optimize_file(path, tmp_path / "b.onnx", Options([long, *others])).unit.optimization
    alone = optimize_file(path, tmp_path / "c.onnx", Options(others)).unit.optimization
    assert [each.status for each in tried.passes] == ["set aside", *(each.status for each in alone.passes)]
    assert (tried.passes[0].reason, tried.after.operators) == ("it makes 5 nodes of 3", alone.after.operators)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "c.onnx"]


def test_a_graph_that_differs_from_itself_is_inconclusive(tmp_path):
    path = written(tmp_path, graph("r = RandomNormalLike(i)\ny = Add(i, r)"))
    optimized = optimize_file(path, tmp_path / "b.onnx", Options(passes_of_level("safe")))
    assert (optimized.unit.verdict, optimized.written) == ("inconclusive", False)
    assert optimized.unit.reason == (
        "the graph differs from itself when run twice, so no pass can be compared with it: y."
    )
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


def test_gradients_among_the_outputs_are_held_like_any(tmp_path):
    """Forward and backward of y = relu(x w) in one graph; the pass forgets the mask of the backward."""
    text = "m = MatMul(i, w)\ny = Relu(m)\np = Greater(m, zero)\nk = Cast<to = 1>(p)\ng = Mul(k, c)\ndx = MatMul(g, t)"
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    model = graph(
        text, {"w": w, "t": w.T.copy(), "zero": np.float32(0), "c": np.ones((4, 4), np.float32)},
        outputs="float[4, 4] y, float[4, 4] dx",
    )  # fmt: skip

    def unmasked(before):
        changed = onnx.ModelProto()
        changed.CopyFrom(before)
        for node in changed.graph.node:
            if node.op_type == "Mul":
                node.input[0] = node.input[1]
        return changed

    passes = [Pass("unmasked", None, "tests", "forgets a mask", unmasked)]
    (finding,) = optimize_file(written(tmp_path, model), tmp_path / "b.onnx", Options(passes)).unit.findings
    assert (finding.tensor, "the first value it changes is g of Mul" in finding.message) == ("dx", True)


@pytest.mark.parametrize("sample", sampled(SAMPLES, 3))
def test_a_sample_is_right_and_no_single_tool_makes_fewer_nodes(sample, tmp_path):
    subject = load_subject(TargetOptions(f"sample_models/{sample}.py"))
    exported = tmp_path / "exported.onnx"
    assert optimize_target(subject, exported, Options([])).written
    output = tmp_path / "optimized.onnx"
    optimized = optimize_target(subject, output, Options(passes_of_level("default")))
    assert (optimized.unit.verdict, optimized.unit.findings, optimized.written) == ("pass", (), True)
    model = onnx.load(exported)
    tools = [PASSES[name] for name in ("onnxscript", "ort-basic", "slim") if not PASSES[name].missing()]
    best = min(len(each.apply(model).graph.node) for each in tools)
    assert len(onnx.load(output).graph.node) <= min(best, len(model.graph.node))
    assert optimized.unit.optimization.after.nodes == len(onnx.load(output).graph.node)


def test_each_graph_is_measured_in_a_session_made_early_and_in_one_made_late(tmp_path):
    files = [read(written(tmp_path, graph(text), f"{k}.onnx")) for k, text in enumerate(["y = Relu(i)", "y = Neg(i)"])]
    found = latencies(files, {"x": torch.ones(4, 4)}, seconds=0)
    assert [each.runs for each in found] == [2 * 3, 2 * 3]
    assert all(0 < each.lower_quartile <= each.median <= each.upper_quartile for each in found)


@pytest.mark.parametrize("version", [18, 22])
def test_an_opset_is_converted_up_and_down(version, tmp_path):
    path = written(tmp_path, graph("m = Gelu(i)\ny = Relu(m)" if version > 20 else "m = Neg(i)\ny = Relu(m)"))
    output = tmp_path / "b.onnx"
    assert optimize_file(path, output, Options(chosen_passes("default", [], version))).written
    assert {each.domain: each.version for each in onnx.load(output).opset_import}[""] == version
    np.testing.assert_allclose(values(output, 0), values(path, 0), rtol=1e-6)


def test_an_opset_without_a_conversion_is_a_finding(tmp_path):
    path = written(tmp_path, graph("m = Gelu(i)\ny = Relu(m)"))
    unit = optimize_file(path, tmp_path / "b.onnx", Options(chosen_passes("safe", [], 12))).unit
    assert [(each.code, each.allow) for each in unit.findings] == [("GC502", "GC502:opset-12")]


def test_a_graph_of_more_than_two_gigabytes_is_refused(tmp_path):
    """The external data are a hole in a sparse file: nothing of it is read."""
    model = graph("y = Add(i, i)")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2**29 + 1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    size = str(4 * (2**29 + 1))
    for key, value in {"location": "w.data", "offset": "0", "length": size}.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    path = written(tmp_path, model)
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(int(size))
    with pytest.raises(TargetError) as caught:
        optimize_file(path, tmp_path / "b.onnx", Options(passes_of_level("safe")), inputs=four_by_four(tmp_path))
    assert caught.value.message == (
        f"{path} has 2.0 GiB with its weights, and optimisers hold at most 2 in one message. Let onnxruntime optimise "
        "it when it is loaded."
    )


def four_by_four(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((4, 4), np.float32))
    return tmp_path / "x.npz"


def test_progress_says_how_many_passes_there_are(tmp_path):
    row = next(iter(PLANTED.values()))
    path, said = written(tmp_path, graph(row.text, row.constants)), []
    optimize_file(path, tmp_path / "b.onnx", Options(around(row), progress=said.append))
    passes = [each for each in said if each.startswith("pass ")]
    assert passes == ["pass 1 of 3: ir-identity", "pass 2 of 3: planted", "pass 3 of 3: onnxscript"]
