"""onnxslim on small graphs; without it, how to install it."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import pytest

from gradctl.passes.onnxslim import missing, slim
from tests.passes.planted import SQUARE, graph, normal, operators_in_order

installed = pytest.mark.skipif(importlib.util.find_spec("onnxslim") is None, reason="onnxslim is not installed")


def test_it_says_how_to_install_it():
    there = importlib.util.find_spec("onnxslim") is not None
    assert missing() == ("" if there else "onnxslim is not installed: pip install 'gradctl[slim]'.")


@installed
def test_it_folds_removes_and_fuses():
    slimmed = slim(graph("t = Transpose(w)\nm = MatMul(i, t)\ny = Add(m, b)", {**SQUARE, "b": normal(4)}))
    assert operators_in_order(slimmed) == ["Gemm"]


@installed
def test_an_input_that_nothing_uses_stays_in_its_place():
    """onnxslim removes it, and a caller who still gives it would get an error."""
    inputs = "float[4, 4] before, float[4, 4] x, float[4, 4] after"
    slimmed = slim(graph("m = Neg(i)\ny = Neg(m)", inputs=inputs))
    assert [each.name for each in slimmed.graph.input] == ["before", "x", "after"]
    onnx.checker.check_model(slimmed)


@installed
def test_an_initializer_that_is_an_input_too_does_not_become_one_without_a_value():
    model = graph("s = Sqrt(p)\ny = Mul(i, s)", {"p": np.abs(normal(4, 4))}, inputs="float[4, 4] x, float[4, 4] p")
    own = {each.name for each in slim(model).graph.initializer}
    assert {each.name for each in slim(model).graph.input} - own == {"x"}


@installed
def test_the_given_model_is_not_changed_and_nothing_is_printed(capfd):
    model = graph("m = MatMul(i, w)\nk = Add(m, b)\ny = Relu(k)", {**SQUARE, "b": normal(4)})
    before = model.SerializeToString(deterministic=True)
    slim(model)
    assert model.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
