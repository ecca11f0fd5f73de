"""Issues of onnxruntime's optimiser: what still holds in 1.32 is undone and named, what does not passes all passes.

Threads are ``microsoft/onnxruntime`` unless named. The graphs of 20321 and 23133 were attachments, of fuzzers; what
they showed, results that differ by level, is what 32413 to 32416 and the integers here show on three nodes.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases.optimizer_graphs import computed, findings, optimized, parsed, statuses
from tests.passes.planted import normal

FOUR = "float[4, 4] x", "float[4, 4] y"
LEVELS = ("ort-basic", "ort-extended", "ort-all")


@pytest.mark.parametrize("level", LEVELS)
def test_one_over_an_integer_times_another_is_no_quotient(level, tmp_path):
    """DivMulFusion makes k / x of (1 / x) * k, for whole numbers too, where 1 / x is 0 beyond one."""
    constants = {"one": np.array(1), "k": np.array([300, 500, 700, 900])}
    model = parsed("h = Div(one, x)\ny = Mul(h, k)", "int64[4] x", "int64[4] y", constants)
    outcome = optimized(tmp_path, model, level, allows=[f"GC501:{level}", "GC501:y"])
    assert f"GC501:{level}" in findings(outcome)
    assert statuses(outcome) == {level: "undone"}
    assert "; 2 of 2 nodes show it: Div, Mul. It was undone." in outcome.unit.findings[0].message
    given = computed(tmp_path / "after.onnx", x=np.array([1, 2, -1, 5]))
    assert given.tolist() == [300, 0, -700, 0]


def test_one_over_a_float_times_another_is_a_quotient(tmp_path):
    constants = {"one": np.float32(1), "k": normal(4)}
    outcome = optimized(tmp_path, parsed("h = Div(one, x)\ny = Mul(h, k)", *FOUR, constants), "ort-basic")
    assert (findings(outcome), statuses(outcome)) == ([], {"ort-basic": "kept"})
    assert outcome.unit.optimization.after.operators == {"Div": 1}


DOUBLE = parsed(
    "h = Relu(x)\ny = Clip(h, a, b)", "double[4] x", "double[4] y", {"a": np.float64(-1), "b": np.float64(1)}
)


def test_relu_and_clip_of_doubles_are_no_session_with_the_optimiser_on(tmp_path):
    """10936, 11836, 23116: FuseReluClip raises on doubles, and so does each session with default settings."""
    outcome = optimized(tmp_path, DOUBLE, "ort-basic")
    assert (outcome.unit.verdict, outcome.written) == ("fail", False)
    assert statuses(outcome) == {"ort-basic": "failed"}
    first, last = outcome.unit.findings
    assert first.message.startswith("pass ort-basic (onnxruntime) was undone: it raises RuntimeError: ")
    assert "Unexpected data type for Clip 'min' input of 11" in first.message
    assert (last.code, last.message.endswith("(onnxruntime's optimiser on).")) == ("GC502", True)


def test_relu_and_clip_of_doubles_are_one_clip_after_onnxscript(tmp_path):
    """The other optimiser fuses them rightly, and what it makes is a graph that sessions take."""
    outcome = optimized(tmp_path, DOUBLE, "onnxscript", "ort-basic")
    assert (outcome.unit.verdict, findings(outcome), outcome.written) == ("pass", [], True)
    x = np.array([-2, -0.5, 0.5, 2])
    assert computed(tmp_path / "after.onnx", x=x).tolist() == [0, 0, 0.5, 1]


def test_an_rms_norm_whose_scale_is_wider_than_its_input_runs_only_with_the_optimiser_off(tmp_path):
    """onnx/onnx 8203: SimplifiedLayerNormFusion takes a Mul for the scale, and the file runs in no default session."""
    text = "s = Pow(x, two)\nm = ReduceMean(s, last)\na = Add(m, small)\nr = Sqrt(a)\nd = Div(x, r)\ny = Mul(d, scale)"
    constants = {"two": np.float32(2), "last": np.array([-1]), "small": np.float32(1e-5), "scale": normal(2)}
    outcome = optimized(tmp_path, parsed(text, "float[1, 1] x", "float[1, 2] y", constants))
    assert (outcome.unit.verdict, outcome.written) == ("fail", False)
    (finding,) = outcome.unit.findings
    assert finding.code == "GC502"
    assert "it does not run with example: " in finding.message
    assert finding.message.endswith("(onnxruntime's optimiser on).")
    assert outcome.unit.optimization.latency_after is None


def test_an_rms_norm_is_one(tmp_path):
    text = "s = Pow(x, two)\nm = ReduceMean(s, last)\na = Add(m, small)\nr = Sqrt(a)\nd = Div(x, r)\ny = Mul(d, scale)"
    constants = {"two": np.float32(2), "last": np.array([-1]), "small": np.float32(1e-5), "scale": normal(4)}
    outcome = optimized(tmp_path, parsed(text, *FOUR, constants), level="max")
    assert (outcome.unit.verdict, findings(outcome), outcome.written) == ("pass", [], True)


TIMES_ONE = "one = Div(c, c)\nm = {}\ny = Mul(m, one)"
POOLED = "float[1, 2, 6, 6] x", "float[1, 2, 6, 6] y"
PADS = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
MENDED = {
    "32413, Identity times a folded one": parsed(TIMES_ONE.format("Identity(x)"), *FOUR, {"c": np.float32(1)}),
    "32414, Dropout times a folded one": parsed(TIMES_ONE.format("Dropout(x)"), *FOUR, {"c": np.float32(1)}),
    "32416, Cast times a folded one": parsed(TIMES_ONE.format("Cast<to = 1>(x)"), *FOUR, {"c": np.float32(1)}),
    "29788, constants that share memory with those folded before": parsed(
        "r = Reshape(c, shape)\ns = Squeeze(r, first)\nf = Flatten(s)\ny = Add(x, f)",
        "float[16, 64] x", "float[16, 64] y",
        {"c": normal(16, 64), "shape": np.array([1, 16, 64]), "first": np.array([0])},
    ),
    "22177, Pad before an average": parsed(
        "p = Pad(x, pads)\ny = AveragePool<kernel_shape = [3, 3]>(p)", *POOLED, PADS
    ),
    "22177, Pad of zeros before a maximum": parsed(
        "p = Pad(x, pads)\ny = MaxPool<kernel_shape = [3, 3]>(p)", *POOLED, PADS
    ),
    "12498, a sum after a convolution in groups": parsed(
        "c = Conv<group = 2>(x, w, b)\ny = Add(c, k)", "float[1, 4, 3, 3] x", "float[1, 4, 3, 3] y",
        {"w": normal(4, 2, 1, 1), "b": normal(4), "k": normal(1, 4, 3, 3)},
    ),
    "4039, float to int and back": parsed("h = Cast<to = 6>(x)\ny = Cast<to = 1>(h)", *FOUR, {}),
    "9915, float to float16 and back": parsed("h = Cast<to = 10>(x)\ny = Cast<to = 1>(h)", *FOUR, {}),
    "18213, two alike of which one is an output": parsed(
        "c = Cos(x)\ns = Squeeze(c, first)\nt = Squeeze(c, first)\ny = Floor(t)",
        "float[1, 4] x", "float[4] y, float[4] s", {"first": np.array([0])},
    ),
    "an adjoint that is passed on and is an output": parsed(
        "d = Identity(g)\nt = Transpose(w)\ndx = MatMul(d, t)\nu = Transpose(x)\ny = MatMul(u, d)",
        "float[4, 4] x, float[4, 4] g", "float[4, 4] y, float[4, 4] dx, float[4, 4] d", {"w": normal(4, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_passes_each_level(name, tmp_path):
    outcome = optimized(tmp_path, MENDED[name], *LEVELS)
    assert (outcome.unit.verdict, findings(outcome), outcome.written) == ("pass", [], True)


def test_folded_constants_are_what_they_were_each_time(tmp_path):
    """29788: memory that was freed gave other numbers from run to run."""
    model = MENDED["29788, constants that share memory with those folded before"]
    x = normal(16, 64, seed=1)
    for _ in range(3):
        optimized(tmp_path, model, "ort-basic")
        np.testing.assert_array_equal(computed(tmp_path / "after.onnx", x=x), x + normal(16, 64))
