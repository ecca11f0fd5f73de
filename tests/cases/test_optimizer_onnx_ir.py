"""Bugs of onnx-ir's Identity elimination (1.1.0): alone it is undone and named, and ``ir-identity`` keeps it from them.

Of the kind of onnxscript 2728, whose output "is not produced by any node".
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import IdentityEliminationPass

from gradctl.passes.pass_result import Pass
from tests.cases.optimizer_graphs import computed, findings, optimized, parsed, statuses
from tests.passes.planted import normal

FOUR = "float[4, 4] x", "float[4, 4] y"
BRANCH = """
c = Greater(s, zero)
h = Relu(x)
y = If (c) <
    then_branch = t () => (float[4, 4] a) {{ a = Identity({0}) }},
    else_branch = e () => (float[4, 4] b) {{ b = Neg({0}) }}
>"""
BODY = """
t = Constant<value_int = 3>()
c = Constant<value = bool {1}>()
h = Relu(x)
y = Loop(t, c, x) <
    body = g (int64 i, bool k, float[4, 4] u) => (bool o, float[4, 4] n) { o = Identity(k) n = Identity(h) }
>"""
SCANNED = """
l, y = Scan<
    num_scan_inputs = 1,
    body = g (float[4] u, float[4] e) => (float[4] n, float[4] o) { n = Add(u, e) o = Identity(n) }
>(start, x)"""


def branch(given):
    return parsed(
        BRANCH.format(given), "float[4, 4] x, float s", FOUR[1], {"zero": np.float32(0), "w": normal(4, 4, seed=3)}
    )


WRONG = {
    "a value from outside a branch": (branch("h"), "GC502"),
    "a value from outside a loop": (parsed(BODY, *FOUR, {}), "GC502"),
    "two outputs of one value": (
        parsed("z = Neg(x)\ny = Identity(z)", FOUR[0], f"{FOUR[1]}, float[4, 4] z", {}), "GC502",
    ),
    "one value for two outputs": (
        parsed("h = Neg(x)\ny = Identity(h)\nz = Identity(h)", FOUR[0], f"{FOUR[1]}, float[4, 4] z", {}), "GC502",
    ),
    "a scan's state that is its result too": (parsed(SCANNED, *FOUR, {"start": np.zeros(4, np.float32)}), "GC501"),
}  # fmt: skip


def eliminated(model):
    return ir.to_proto(IdentityEliminationPass()(ir.from_proto(model)).model)


@pytest.mark.parametrize("name", WRONG)
def test_what_its_own_pass_renames_is_undone_and_named(name, tmp_path):
    model, code = WRONG[name]
    its_own = Pass("its-own", None, "onnx-ir", "renames too much", eliminated)
    outcome = optimized(tmp_path, model, its_own, allows=[f"{code}:its-own"])
    assert (findings(outcome), outcome.written) == ([f"{code}:its-own"], True)


@pytest.mark.parametrize("name", WRONG)
def test_the_pass_here_leaves_those_alone(name, tmp_path):
    outcome = optimized(tmp_path, WRONG[name][0], "ir-identity")
    assert (outcome.unit.verdict, findings(outcome)) == ("pass", [])
    left = outcome.unit.optimization.after.operators.get("Identity", 0)
    assert left == (2 if name == "a value from outside a loop" else 1)  # its condition is an input that is an output


def test_the_branch_gives_what_it_gave(tmp_path):
    optimized(tmp_path, branch("h"))
    x = normal(4, 4, seed=1)
    for s, sign in ((1, 1), (-1, -1)):
        given = computed(tmp_path / "after.onnx", x=x, s=np.array(s, np.float32))
        np.testing.assert_array_equal(given, sign * np.maximum(x, 0))


@pytest.mark.parametrize("given", ["x", "w"], ids=["an input", "an initializer"])
def test_a_branch_that_gives_an_input_or_a_constant_is_left_alone(given, tmp_path):
    outcome = optimized(tmp_path, branch(given))
    assert (outcome.unit.verdict, findings(outcome), statuses(outcome)["ir-identity"]) == ("pass", [], "unchanged")


def test_an_identity_inside_a_branch_goes(tmp_path):
    text = BRANCH.replace("a = Identity({0})", "d = Identity({0}) f = Exp(d) a = Identity(f)").format("h")
    model = parsed(text, "float[4, 4] x, float s", FOUR[1], {"zero": np.float32(0)})
    outcome = optimized(tmp_path, model, "ir-identity")
    assert (findings(outcome), statuses(outcome)) == ([], {"ir-identity": "kept"})
    assert "Identity" not in outcome.unit.optimization.after.operators
