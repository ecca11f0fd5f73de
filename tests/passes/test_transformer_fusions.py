"""onnxruntime.transformers: which graphs it is for, what it fuses, and that the file is ONNX."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest

from gradctl.passes.pass_result import NotApplicable
from gradctl.passes.transformer_fusions import fuse, model_type
from tests.passes.planted import graph, normal, operators_in_order
from tests.passes.test_onnxruntime import ATTENTION, WEIGHTS, loaded

CUBE = {"inputs": "float[2, 3, 4] x", "outputs": "float[2, 3, 4] y"}
RMS_NORM = """
sq = Pow({0}, two)
mean = ReduceMean<keepdims = 1>(sq, last)
more = Add(mean, small)
root = Sqrt(more)
inverse = Reciprocal(root)
normal = Mul({0}, inverse)
{1} = Mul(normal, scale)"""
RMS_WEIGHTS = {"two": np.float32(2), "last": np.array([-1]), "small": np.float32(1e-5)}


def attention():
    return graph(ATTENTION, WEIGHTS, **CUBE)


def attention_after_an_rms_norm():
    text = ATTENTION.replace("n = LayerNormalization<axis = -1>(i, scale, shift)", RMS_NORM.format("i", "n"))
    return graph(text, WEIGHTS | RMS_WEIGHTS, **CUBE)


def test_a_skip_and_a_layer_norm_are_one_operator():
    model, x = attention(), normal(2, 3, 4, seed=30)
    fused = fuse(model)
    assert "SkipLayerNormalization" in operators_in_order(fused)
    assert {each.domain for each in fused.opset_import} == {"", "com.microsoft"}
    expected = loaded(model, "BASIC").run(None, {"x": x})[0]
    np.testing.assert_allclose(loaded(fused).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_an_rms_norm_stays_as_it_is_written():
    """onnxruntime would put SimplifiedLayerNormalization among ONNX's own operators, and the file would be none."""
    model, x = attention_after_an_rms_norm(), normal(2, 3, 4, seed=30)
    fused = fuse(model)
    onnx.checker.check_model(fused)
    assert "SimplifiedLayerNormalization" not in operators_in_order(fused)
    expected = loaded(model, "BASIC").run(None, {"x": x})[0]
    np.testing.assert_allclose(loaded(fused).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    ["m = MatMul(i, w)\ny = Softmax(m)", "m = MatMul(i, w)\nn = MatMul(m, w)\nk = Softmax(n)\ny = Relu(k)"],
    ids=["one product", "no norm"],
)
def test_what_has_no_attention_is_refused_in_a_sentence(text):
    with pytest.raises(NotApplicable) as caught:
        fuse(graph(text, {"w": normal(4, 4)}))
    assert str(caught.value) == "the graph is no transformer: it has no attention (Softmax, two MatMul) with a norm."


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.gpt2.weight", "gpt2"),
        ("GPTNeoX.layers.0.weight", "gpt_neox"),
        ("vision_model.clip.weight", "clip"),
        ("encoder.block.0.T5.weight", "t5"),
        ("layers.0.weight", "bert"),
    ],
)
def test_a_kind_is_known_by_the_names_of_weights(name, kind):
    model = attention()
    for each in model.graph.initializer:
        if each.name == "shift":
            each.name = name
    assert model_type(model) == kind


def test_a_kind_is_known_by_the_classes_that_an_exporter_notes():
    model = attention()
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.class_hierarchy", value="['models.vit.ViTModel']")
    assert model_type(model) == "vit"


def test_the_given_model_is_not_changed_nothing_is_printed_and_logging_is_as_it_was(capfd):
    model = attention()
    before, disabled = model.SerializeToString(deterministic=True), logging.root.manager.disable
    fuse(model)
    assert model.SerializeToString(deterministic=True) == before
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == disabled
