"""OpenVINO as a form: right models agree, its own bugs are found, and what it cannot run is refused in one sentence."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.core.names import DEFAULT_FORMS, NEEDS_PROCESS, RUNTIME_FORMS
from gradctl.core.target_options import TargetOptions
from gradctl.forms.form import CannotCapture
from gradctl.forms.runtimes.package import import_package
from gradctl.subject.loading.load import load_subject
from tests.compared import causes, compared, comparing, different, verdicts

X = torch.tensor([[0.5, -1.0, 2.0], [-3.0, 0.0, 1.0]])
COUNTS = torch.tensor([3, 4])
BYTES = torch.tensor([200, 3], dtype=torch.uint8)


def refusal(name: str) -> str:
    with pytest.raises(CannotCapture) as caught:
        import_package(name, "openvino")
    return caught.value.reason


# ------------------------------------------------------------------ without OpenVINO


def test_runtimes_are_compared_only_if_they_are_named():
    assert DEFAULT_FORMS == ("eager", "trace", "script", "export", "aot", "compile", "onnx")
    assert set(RUNTIME_FORMS) <= set(NEEDS_PROCESS)  # a segmentation fault ends the unit, not the report


def test_the_reason_says_what_installs_a_missing_package():
    assert refusal("absent_runtime") == "absent_runtime is not installed: pip install 'gradctl[openvino]'."


def test_a_broken_package_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_runtime.py").write_text("raise OSError('libopenvino.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    said = "broken_runtime cannot be imported: OSError: libopenvino.so: cannot open shared object file."
    assert refusal("broken_runtime") == said


# ------------------------------------------------------------------ right models


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino")


class Residual(nn.Module):
    """A convolution, a norm and relu: what the residual networks of the samples are made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.conv(image)).relu()
        return {"scores": self.head((hidden + hidden.roll(1, 0)).mean((2, 3))), "positive": image > 0}


@pytest.mark.parametrize("form", ["openvino", "openvino-joint"])
def test_a_residual_network_agrees(openvino, form):
    unit = compared(form, Residual().eval(), torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert (unit.verdict, unit.form) == ("pass", form)
    assert set(verdicts(unit).values()) == ({"same"} if form == "openvino-joint" else set())
    assert {each.quantity for each in unit.tensors} >= {"output"}


def test_float32_is_computed_in_float32_also_where_the_processor_has_bfloat16(openvino):
    from gradctl.forms.form import Captured
    from gradctl.forms.runtimes import openvino as form

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), torch.randn(64, 256)
    captured: Captured = form.capture(comparing(model, x).reference.instance())
    first, _, last = (each for each in model)
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, last.weight, last.bias))
    expected = np.maximum(x.double().numpy() @ w1.T + b1, 0) @ w2.T + b2
    found = captured.call(x).double().numpy()
    assert np.linalg.norm(found - expected) < 2e-6 * np.linalg.norm(expected)  # bfloat16: 3e-3


def test_inputs_outputs_and_unused_ones_keep_their_order(openvino):
    def model(b: Tensor, unused: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return a - b, b, a.sum(), a - b

    unit = compared("openvino", model, X, X + 1, X * 2)
    assert unit.verdict == "pass"
    assert len([each for each in unit.tensors if each.quantity == "output"]) == 4


# ------------------------------------------------------------------ bugs of OpenVINO 2026.4, and models beside them


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        # The factors are multiplied first, and 1e50 is infinite in float32.
        pytest.param(lambda x, counts, few: (x * 1e25 * 1e25, counts), "output.0", id="factors are multiplied first"),
        pytest.param(lambda x, counts, few: (x, counts * 2**31), "output.1", id="int64 is computed in int32"),
        pytest.param(lambda x, counts, few: (x, few + few), "output.1", id="uint8 saturates"),
    ],
)
def test_a_wrong_result_of_openvino_is_named_and_onnxruntime_absolves_the_file(openvino, model, tensor):
    unit = compared("openvino", model, X * 1e-20, COUNTS, BYTES)
    assert different(unit) == {tensor: "GC301"}
    assert causes(unit) == {"GC216"}


def test_what_is_within_the_ranges_agrees(openvino):
    unit = compared(
        "openvino", lambda x, counts, few: (x * 1e-25 * 1e25, counts * 2**28, few // 2 + few // 4), X, COUNTS, BYTES
    )
    assert unit.verdict == "pass"


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("form", ["openvino", "openvino-joint"])
def test_a_float64_model_is_refused_since_it_would_be_computed_in_float32(openvino, form):
    unit = compared(form, nn.Linear(3, 2).double(), X.double())
    assert (unit.status, unit.verdict) == ("unsupported", "inconclusive")
    version = openvino.__version__.partition("-")[0]
    port = "input" if form == "openvino" else "weight"
    assert unit.reason == (
        f"the model is exported, and the exported file cannot be run by OpenVINO {version}: '{port}' is float64, which "
        "it computes in float32 on the CPU. Use a float32 model."
    )


def test_an_operator_that_openvino_lacks_is_named(openvino):
    unit = compared("openvino", lambda x: torch.linalg.det(x[:, :2]) + x.sum(), X)
    assert unit.status == "unsupported"
    assert re.search(r" be run by OpenVINO [\d.]+: No conversion rule found for operations: Det-\d+\.$", unit.reason)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["openvino", "openvino-joint"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer", "tied_weights", "forces", "straight_through_detach"])
def test_a_right_sample_agrees(openvino, name, form):
    subject = load_subject(TargetOptions(f"sample_models/{name}.py"))
    assert Comparing(subject, Allows(())).form(form, named=True).verdict == "pass"
