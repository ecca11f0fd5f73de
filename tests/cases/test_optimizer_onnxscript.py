"""Issues of onnxscript's optimizer, rewrite rules and version converter: what still holds in 0.7.2 is undone and named.

Threads are ``microsoft/onnxscript``. What is mended passes all passes, and changes nothing.
"""

from __future__ import annotations

import numpy as np
import pytest

from gradctl.passes.opset import conversion
from tests.cases.optimizer_graphs import computed, findings, optimized, parsed, statuses
from tests.passes.planted import normal

X = np.array(
    [[-9.0, -2.5, -2.0, -1.0], [-0.5, 0.0, 0.5, 1.0], [1.5, 2.0, 2.5, 3.0], [9.0, -3.0, 0.25, -4.0]], np.float32
)
FOUR = "float[4, 4] x", "float[4, 4] y"


def clips(first, second):
    """Return two clips, one upon the other, and their bounds."""
    bounds = dict(zip(("a", "b", "c", "d"), map(np.float32, (*first, *second)), strict=True))
    return parsed("h = Clip(x, a, b)\ny = Clip(h, c, d)", *FOUR, bounds)


def test_clips_that_do_not_overlap_are_made_one_that_is_none(tmp_path):
    """2410's rule takes the larger of the lower bounds and the smaller of the upper: Clip(2, 1) gives 1, not 2."""
    outcome = optimized(tmp_path, clips((0, 1), (2, 3)), "onnxscript", allows=["GC501:onnxscript"])
    assert (findings(outcome), statuses(outcome)) == (["GC501:onnxscript"], {"onnxscript": "undone"})
    (finding,) = outcome.unit.findings
    assert "; 2 of 2 nodes show it: Clip, Clip. It was undone." in finding.message
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=X), np.full((4, 4), 2, np.float32))


def test_clips_that_overlap_are_one(tmp_path):
    outcome = optimized(tmp_path, clips((-2, 2), (-1, 3)), "onnxscript")
    assert (findings(outcome), statuses(outcome)) == ([], {"onnxscript": "kept"})
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=X), np.clip(X, -1, 2))


def relu_of_clip(low, high):
    return parsed("h = Clip(x, a, b)\ny = Relu(h)", *FOUR, {"a": np.float32(low), "b": np.float32(high)})


def test_relu_of_a_negative_clip_is_not_that_clip(tmp_path):
    """2410: Relu(Clip(x, -3, -1)) is 0 everywhere, and Clip(x, 0, -1) is -1."""
    outcome = optimized(tmp_path, relu_of_clip(-3, -1), allows=["GC501:onnxscript", "GC501:rewrite"])
    assert findings(outcome) == ["GC501:onnxscript", "GC501:rewrite"]
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=X), np.zeros((4, 4), np.float32))


def test_relu_of_a_clip_that_reaches_zero_is_a_clip(tmp_path):
    outcome = optimized(tmp_path, relu_of_clip(-3, 1), "rewrite")
    assert (findings(outcome), statuses(outcome)) == ([], {"rewrite": "kept"})
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=X), np.clip(X, 0, 1))


@pytest.mark.parametrize("upper", ["", ", b"], ids=["no upper bound", "both bounds"])
def test_a_clip_of_relu_breaks_the_rules_alone(upper, tmp_path):
    """2836: the rule asks for the dtype of an inner value, which a file need not note."""
    bounds = {"a": np.float32(-1), "b": np.float32(1)}
    model = parsed(
        f"h = Relu(x)\ny = Clip(h, a{upper})", *FOUR, {name: bounds[name] for name in "ab"[: 1 + bool(upper)]}
    )
    outcome = optimized(tmp_path, model, "rewrite", "onnxscript", allows=["GC502:rewrite"])
    assert (findings(outcome), statuses(outcome)) == (["GC502:rewrite"], {"rewrite": "failed", "onnxscript": "kept"})
    assert outcome.unit.findings[0].message == (
        "pass rewrite (onnxscript) was undone: it raises AttributeError: 'NoneType' object has no attribute 'numpy'."
    )
    np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=X), np.clip(X, 0, 1 if upper else None))


@pytest.mark.parametrize("version", [13, 18, 21])
def test_hardmax_changes_its_meaning_from_opset_12_to_13(version, tmp_path):
    """Before 13 its axis, 1 unless said, starts a block that is flattened; from 13 on it is one axis, the last."""
    model = parsed("y = Hardmax(x)", "float[2, 3, 4] x", "float[2, 3, 4] y", {}, opset=12)
    name = f"opset-{version}"
    outcome = optimized(tmp_path, model, conversion(version), allows=[f"GC501:{name}"])
    assert (findings(outcome), statuses(outcome)) == ([f"GC501:{name}"], {name: "undone"})
    x = normal(2, 3, 4)
    assert computed(tmp_path / "after.onnx", x=x).sum(axis=(1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("version", [13, 18, 21])
def test_resize_changes_its_coordinates_from_opset_10_to_11(version, tmp_path):
    """In 10 a point of the result is the same share of the input's; from 11 on, unless said, pixels' middles are."""
    sizes = {"s": np.array([1, 1, 1, 2], np.float32)}
    text = 'y = Resize<mode = "linear">(x, s)'
    model = parsed(text, "float[1, 1, 1, 2] x", "float[1, 1, 1, 4] y", sizes, opset=10)
    name = f"opset-{version}"
    outcome = optimized(tmp_path, model, conversion(version), allows=[f"GC501:{name}"])
    assert (findings(outcome), statuses(outcome)) == ([f"GC501:{name}"], {name: "undone"})
    given = computed(tmp_path / "after.onnx", x=np.array([[[[0, 8]]]], np.float32))
    assert given.flatten().tolist() == [0, 4, 8, 8]


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
def test_softmax_is_converted_with_its_meaning(operator, tmp_path):
    model = parsed(f"y = {operator}(x)", "float[2, 3, 4] x", "float[2, 3, 4] y", {}, opset=12)
    outcome = optimized(tmp_path, model, conversion(18))
    assert (findings(outcome), statuses(outcome)) == ([], {"opset-18": "kept"})


CONSTANT_BRANCH = """
s = Shape(x)
d = Gather(s, last)
c = Equal(d, one)
r = If (c) <
    then_branch = t () => (float[4] a) <int64[1] axes = {1}> { a = Squeeze(x, axes) },
    else_branch = e () => (float[4, 1] b) { b = Identity(x) }
>
y = Neg(r)"""
FOLDED_OUTPUT = """
k = Constant<value_int = 1>()
c = Cast<to = 9>(k)
z = If (c) <
    then_branch = t () => (float[4, 4] a) { a = ConstantOfShape<value = float[1] {1.0}>(sizes) },
    else_branch = e () => (float[4, 4] b) { b = Neg(x) }
>
y = Add(z, x)"""
IN_A_FUNCTION = """
<domain: "this", opset_import: ["" : 20]> f (x) => (r) {
    k = Constant<value_int: int = 1>()
    t = Cast<to: int = 1>(k)
    r = Sub(t, x)
}"""
BATCH_NORM = {name: normal(4, seed=place) for place, name in enumerate(("b", "scale", "shift", "mean"))}
BATCH_NORM |= {"w": normal(4, 4, seed=4), "variance": np.abs(normal(4, seed=5)) + 1}
MENDED = {
    "2810, initializers of a branch that is chosen": parsed(
        CONSTANT_BRANCH, "float[4, 1] x", "float[4] y", {"last": np.array(1), "one": np.array(1)}
    ),
    "2728, an output that folds away in a branch": parsed(
        FOLDED_OUTPUT, "float[4, 4] x", "float[4, 4] y, float[4, 4] z", {"sizes": np.array([4, 4])}
    ),
    "2673, folding inside a function": parsed(
        "y = this.f(x)", *FOUR, {}, functions=IN_A_FUNCTION, domains=', "this" : 1'
    ),
    "3027, a batch norm after a Gemm of beta 2": parsed(
        "g = Gemm<beta = 2.0>(x, w, b)\ny = BatchNormalization(g, scale, shift, mean, variance)", *FOUR, BATCH_NORM
    ),
    "2858, a split into parts that are not alike": parsed(
        "s = SplitToSequence<axis = 0>(x, three)\ny = SequenceAt(s, one)",
        "float[4, 4] x", "float[1, 4] y", {"three": np.array(3), "one": np.array(1)},
    ),
    "2841, a Pad that cuts off before a convolution": parsed(
        "p = Pad(x, pads)\ny = Conv(p, w)", "float[1, 2, 6, 6] x", "float[1, 2, 4, 4] y",
        {"pads": np.array([0, 0, -1, -1, 0, 0, 1, 1]), "w": normal(2, 2, 3, 3)},
    ),
    "2883, a weight of two convolutions and two batch norms": parsed(
        "g = Conv(x, w)\nh = Conv(x, w)\nk = BatchNormalization(g, scale, shift, mean, variance)\n"
        "m = BatchNormalization(h, shift, scale, mean, variance)\ny = Add(k, m)",
        "float[1, 4, 5, 5] x", "float[1, 4, 5, 5] y",
        {name: value for name, value in BATCH_NORM.items() if name not in "wb"} | {"w": normal(4, 4, 1, 1)},
    ),
    "2947, shapes of reshapes that share an initializer": parsed(
        "a = Reshape(x, s)\nb = Reshape(a, t)\nc = Reshape(z, s)\nd = Reshape(c, t)\ny = MatMul(b, d)",
        "float[4, 4] x, float[4, 8] z", "float[4, 8] y", {"s": np.array([2, -1]), "t": np.array([4, -1])},
    ),
}  # fmt: skip


UNCHANGED = "2841"  # its rule leaves it alone now


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_passes_all_passes(name, tmp_path):
    outcome = optimized(tmp_path, MENDED[name], "fold", "onnxscript", "rewrite")
    assert (outcome.unit.verdict, findings(outcome), outcome.written) == ("pass", [], True)
    assert ("kept" in statuses(outcome).values()) == (not name.startswith(UNCHANGED))


@pytest.mark.parametrize("name", [name for name in MENDED if name.startswith(("2810", "2728"))])
def test_the_branch_that_is_chosen_stands_in_the_graph(name, tmp_path):
    assert "If" not in optimized(tmp_path, MENDED[name]).unit.optimization.after.operators
