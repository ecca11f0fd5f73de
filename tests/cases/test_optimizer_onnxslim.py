"""Issues of onnxslim: what still holds in 0.1.9x is undone and named. Threads are ``inisis/OnnxSlim``."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases.optimizer_graphs import computed, findings, optimized, parsed, statuses
from tests.passes.planted import normal

pytest.importorskip("onnxslim")

IMAGE = "float[1, 4, 4, 4] x", "float[1, 4, 4, 4] y"


def scaled(shape):
    """Return a convolution by one pixel, and a product with a constant of some shape."""
    constants = {"w": np.eye(4, dtype=np.float32)[:, :, None, None], "b": np.zeros(4, np.float32), "k": scale(shape)}
    return parsed("c = Conv(x, w, b)\ny = Mul(c, k)", *IMAGE, constants)


def scale(shape):
    return np.arange(1, 5, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(4,), (1, 1, 1, 4), (4, 1)], ids=["width", "width in full", "height"])
def test_a_scale_along_height_or_width_is_none_of_channels(shape, tmp_path):
    """209 fuses Conv and Mul where the constant has as many elements as there are channels, wherever they lie."""
    outcome = optimized(tmp_path, scaled(shape), "slim", allows=["GC501:slim"])
    assert (findings(outcome), statuses(outcome)) == (["GC501:slim"], {"slim": "undone"})
    assert "; 2 of 2 nodes show it: Conv, Mul. It was undone." in outcome.unit.findings[0].message
    x = normal(1, 4, 4, 4)
    np.testing.assert_allclose(computed(tmp_path / "after.onnx", x=x), x * scale(shape), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1)])
def test_a_scale_of_channels_is_fused(shape, tmp_path):
    outcome = optimized(tmp_path, scaled(shape), "slim")
    assert (findings(outcome), statuses(outcome)) == ([], {"slim": "kept"})
    assert outcome.unit.optimization.after.operators == {"Conv": 1}


def sliced(first, second, shape):
    """Return a slice of a slice, each (start, end, axis)."""
    names = ("a", "b", "c"), ("d", "e", "f")
    bounds = {
        name: np.array([value])
        for group, values in zip(names, (first, second), strict=True)
        for name, value in zip(group, values, strict=True)
    }
    return parsed("s = Slice(x, a, b, c)\ny = Slice(s, d, e, f)", "float[4, 4] x", f"float{list(shape)} y", bounds)


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        ((1, 3, 0), (1, 3, 1), (2, 2)),
        ((1, 4, 0), (-2, 2**63 - 1, 1), (3, 2)),
        ((1, 4, 0), (-2, 2**63 - 1, 0), (2, 4)),
        ((0, 2, 0), (0, 3, 0), (2, 4)),
    ],
)
def test_a_slice_of_a_slice_is_what_it_was(first, second, shape, tmp_path):
    """13 and 277, mended."""
    outcome = optimized(tmp_path, sliced(first, second, shape), "slim")
    assert (outcome.unit.verdict, findings(outcome)) == ("pass", [])
