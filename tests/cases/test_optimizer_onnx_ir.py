"""An issue of onnx-ir's passes: what still holds in 1.1.0 is undone and named."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases.optimizer_graphs import computed, findings, optimized, parsed, statuses
from tests.passes.planted import normal

PASSED_THROUGH = """
c = Greater(s, zero)
{above}
y = If (c) <
    then_branch = t () => (float[4, 4] a) {{ a = Identity({given}) }},
    else_branch = e () => (float[4, 4] b) {{ b = Neg({given}) }}
>"""


def branch(above, given):
    text = PASSED_THROUGH.format(above=above, given=given)
    return parsed(text, "float[4, 4] x, float s", "float[4, 4] y", {"zero": np.float32(0), "w": normal(4, 4)})


def test_a_branch_that_gives_a_value_from_outside_loses_its_output(tmp_path):
    """Identity elimination renames the value outside to the branch's output, which nothing in the branch makes then.

    Of the kind of onnxscript 2728, whose output "is not produced by any node".
    """
    outcome = optimized(tmp_path, branch("h = Relu(x)", "h"), allows=["GC502:ir-identity"])
    assert findings(outcome) == ["GC502:ir-identity"]
    assert outcome.unit.findings[0].message == (
        "pass ir-identity (onnx-ir) was undone: ONNX's checker refuses it: Graph output 'a' is not an output of any "
        "node in graph."
    )
    assert outcome.written
    x = normal(4, 4, seed=1)
    for s, sign in ((1, 1), (-1, -1)):
        given = computed(tmp_path / "after.onnx", x=x, s=np.array(s, np.float32))
        np.testing.assert_array_equal(given, sign * np.maximum(x, 0))


@pytest.mark.parametrize("given", ["x", "w"], ids=["an input", "an initializer"])
def test_a_branch_that_gives_an_input_or_a_constant_is_left_alone(given, tmp_path):
    outcome = optimized(tmp_path, branch("", given))
    assert (outcome.unit.verdict, findings(outcome), statuses(outcome)["ir-identity"]) == ("pass", [], "unchanged")
