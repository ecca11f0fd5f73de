"""Causes of a form's differences: each beside a twin that does the same thing and is not to blame.

The twin's form differs for another reason, planted by asking inside forward whether somebody is capturing. No
experiment explains that, so there is no cause: none is guessed.
"""

import inspect
import random
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradctl.comparison.form_comparison import form_comparison
from gradctl.core.findings import Unit
from gradctl.diagnosis.explanation import PreRunObservations
from gradctl.forms.onnx.from_file import wrap_file
from gradctl.forms.table import form_named
from gradctl.forms.torchscript.scripted_module import wrap_script
from gradctl.onnxio.onnx_file import read
from tests.compared import causes, compared, comparing
from tests.functions import Reversal, Square

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def captured_now() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.hazard(self.fc(x)))
        return 1.1 * y if self.planted and captured_now() else y

    planted = False

    def hazard(self, h: Tensor) -> Tensor:
        return h


class CustomBackward(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return Reversal.apply(h)


class CustomDerivative(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return Square.apply(h)


class TwoFunctions(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return Reversal.apply(Square.apply(h))


class NoGrad(Net):
    def hazard(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.square().sum()
        return h * scale


class TwoBlocks(Net):
    """The second block cuts a constant: only the first loses anything."""

    def hazard(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.square().sum()
        with torch.no_grad():
            ones = torch.ones_like(h)
        return h * scale + ones


class Hooked(Net):
    def hazard(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(lambda gradient: 3 * gradient)
        return h


class NoGradAndHook(Net):
    def hazard(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = h.square().sum()
        h = h * scale
        if h.requires_grad:
            h.register_hook(lambda gradient: 3 * gradient)
        return h


class Branch(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return h * 2 if (h - self.fc.bias).sum() > 0 else h * 3


class Loop(Net):
    def hazard(self, h: Tensor) -> Tensor:
        while h.abs().sum() < 50:
            h = 1.5 * h
        return h


class LoopOverNumber(Net):
    def hazard(self, h: Tensor) -> Tensor:
        for _ in range(int(h.abs().sum())):
            h = 1.05 * h
        return h


class Number(Net):
    """Also takes a number that it makes nothing of."""

    def hazard(self, h: Tensor) -> Tensor:
        h.detach().min().item()
        return h * float(h.detach().max())


class Strides(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if x.is_contiguous() else 3.0)


class Attribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def hazard(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


class Drawn(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return h * random.random()


class Noisy(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return h + torch.randn_like(h)


class Normalised(Net):
    def hazard(self, h: Tensor) -> Tensor:
        return self.bn(h)


# form, model, cause: what the form loses or bakes in
LOST = {
    "custom backward": ("export", CustomBackward, "GC204"),
    "one of two Functions": ("export", TwoFunctions, "GC204"),
    "no_grad": ("trace", NoGrad, "GC201"),
    "one of two blocks": ("trace", TwoBlocks, "GC201"),
    "hook, traced": ("trace", Hooked, "GC203"),
    "hook, exported": ("export", Hooked, "GC203"),
    "branch": ("trace", Branch, "GC205"),
    "loop": ("trace", Loop, "GC206"),
    "loop over a number": ("trace", LoopOverNumber, "GC206"),
    "number": ("trace", Number, "GC207"),
    "attribute": ("export", Attribute, "GC207"),
    "strides": ("export", Strides, "GC208"),
    "BatchNorm in onnx": ("onnx", Normalised, "GC209"),
    "Python's random number": ("trace", Drawn, "GC210"),
    "noise in onnx": ("onnx", Noisy, "GC210"),
}


def planted(model: type[Net]) -> Net:
    built = model()
    built.planted = True
    return built


@pytest.mark.parametrize("name", LOST)
def test_what_a_form_loses_is_the_cause_of_each_of_its_errors(name):
    form, model, cause = LOST[name]
    assert causes(compared(form, model(), X)) == {cause}


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("export", CustomDerivative),
        ("trace", CustomBackward),
        ("export", NoGrad),
        ("aot", Hooked),
        ("aot", Branch),
        pytest.param("aot", Loop, marks=pytest.mark.slow),  # the same cause as Branch
        ("aot", Number),
        ("export", Noisy),
        ("trace", Normalised),
    ],
)
def test_a_difference_beside_something_that_the_form_keeps_has_no_cause(form, model):
    assert compared(form, model(), X).verdict == "pass"
    assert causes(compared(form, planted(model), X)) == {None}


def test_a_planted_difference_beside_a_dropped_backward_is_not_blamed_on_it():
    """The outputs are off by a tenth, and the gradients behind the Function by that and by their sign."""
    unit = compared("export", planted(CustomBackward), X)
    found = {each.tensor: each.cause for each in unit.findings if each.severity == "error"}
    assert {"output", "input:x", "param:fc.weight", "param:last.weight"} <= set(found)
    assert set(found.values()) == {None}


def line_of(model: type[Net], text: str) -> int:
    lines, first = inspect.getsourcelines(model)
    return first + next(number for number, line in enumerate(lines) if text in line)


@pytest.mark.parametrize(
    ("form", "model", "text"),
    [
        ("export", CustomBackward, "Reversal.apply"),
        ("trace", TwoBlocks, "with torch.no_grad():"),
        ("trace", Hooked, "register_hook"),
        ("trace", Branch, "sum() > 0"),
        ("trace", Loop, "while"),
        ("trace", Number, "float("),
        ("export", Strides, "is_contiguous"),
        ("trace", Drawn, "random.random"),
        ("onnx", Noisy, "randn_like"),
    ],
)
def test_the_message_ends_in_the_line(form, model, text):
    unit = compared(form, model(), X)
    (message, *_) = [each.message for each in unit.findings if each.severity == "error"]
    assert message.endswith(f"tests/diagnosis/test_causes.py:{line_of(model, text)}.")


def test_of_two_functions_the_one_whose_backward_matters_is_named():
    message = compared("export", TwoFunctions(), X).findings[0].message
    assert "keeps the forward of Reversal and drops its backward" in message


def test_two_things_dropped_at_once_are_both_said():
    unit = compared("trace", NoGradAndHook(), X)
    assert causes(unit) == {"GC201"}
    assert all("drops no_grad" in each.message and "drops the hook" in each.message for each in unit.findings)


# ------------------------------------------------------------------ files, which start as they were saved


def unit_of_trace(traced: Any, model: nn.Module, *args: Tensor):
    return comparing(model, *args).captured(wrap_script("trace", traced), form_named("trace"))


def test_statistics_that_tracing_moved_are_a_cause():
    model = Normalised().train()
    traced = torch.jit.trace(model, (X,), check_trace=False)
    assert not torch.equal(traced.bn.running_mean, Normalised().bn.running_mean)
    assert causes(unit_of_trace(traced, Normalised().train(), X)) == {"GC211"}


def test_statistics_put_back_after_tracing_are_none():
    model = Normalised().train()
    traced = torch.jit.trace(model, (X,), check_trace=False)
    model.load_state_dict(Normalised().state_dict())
    assert unit_of_trace(traced, Normalised().train(), X).verdict == "pass"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


@pytest.mark.parametrize(("factor", "expected"), [(1.5, {"GC212"}), (1.0, set())])
def test_tied_weights_that_were_trained_apart_are_a_cause(factor, expected):
    ids, apart = torch.tensor([1, 4, 2]), Tied()
    apart.head.weight = nn.Parameter(factor * apart.head.weight.detach())
    assert causes(unit_of_trace(torch.jit.trace(apart, (ids,)), Tied(), ids)) == expected


@pytest.mark.parametrize(("baked", "expected"), [("dropout", {"GC209"}), ("nothing", set())])
def test_a_trace_of_a_model_in_evaluation_is_not_the_model_in_training(baked, expected):
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    traced = torch.jit.trace(model.eval() if baked == "dropout" else model, (X,), check_trace=False)
    assert causes(unit_of_trace(traced, model.train(), X)) == expected


# ------------------------------------------------------------------ dtypes, inputs, onnxruntime


class Wider(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.double() if captured_now() else y


class Marks(Net):
    """Marks what it has used, through numpy, which is no operator."""

    def forward(self, x: Tensor, used: Tensor) -> Tensor:
        used.numpy()[:] = 1
        return super().forward(x)


def test_another_dtype_is_its_own_cause():
    unit = compared("trace", Wider(), X)
    assert [each.cause for each in unit.findings if each.tensor == "output"] == ["GC214"]


def test_an_input_that_only_eager_changes():
    assert causes(compared("trace", Marks(), X, torch.tensor([0, 0]))) == {"GC213"}


def scaled_file(path, factor: float):
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[6, 4] x) => (float[6, 4] output) {{
        factor = Constant<value = float {{{factor}}}>()
        output = Mul(x, factor)
    }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    return read(path)


@pytest.mark.parametrize(("without_optimiser", "expected"), [(2.0, {"GC216"}), (3.0, set())])
def test_what_is_right_without_onnxruntimes_optimiser_is_its_doing(tmp_path, without_optimiser, expected):
    """The running session is that of a wrong file, as an optimiser that errs would make it of a right one."""
    eager = comparing(lambda x: 2 * x, X)
    captured = wrap_file(scaled_file(tmp_path / "optimised.onnx", 3.0), eager.reference.instance())
    captured = replace(captured, artifact=scaled_file(tmp_path / "plain.onnx", without_optimiser))
    comparison = form_comparison(eager.reference, captured)
    witness = PreRunObservations.of(captured, eager.reference)
    comparison.compare_natively()
    witness.ask(comparison)
    assert {cause.code for cause in witness.causes.values()} == expected


# ------------------------------------------------------------------ what explains most, before the numbers


def usual(unit: Unit) -> list[str]:
    return [each.message for each in unit.findings if each.code == "GC220"]


def test_a_narrow_dtype_is_said_before_what_has_no_cause():
    model = planted(Net).bfloat16()
    note, *others = compared("trace", model, X.bfloat16()).findings
    assert (note.code, note.severity) == ("GC220", "note")
    assert "computes in bfloat16" in note.message
    assert {each.cause for each in others} == {None}


def test_a_mode_that_matters_is_said_and_one_that_does_not_is_not():
    notes = [
        each.message for each in compared("trace", planted(Normalised).train(), X).findings if each.code == "GC220"
    ]
    assert len(notes) == 1
    assert "BatchNorm1d: in training mode it uses the statistics of the batch" in notes[0]
    assert usual(compared("trace", planted(Net).train(), X)) == []


def test_dropout_that_is_active_is_said():
    class Dropped(Net):
        def hazard(self, h: Tensor) -> Tensor:
            return F.dropout(h, 0.5, self.training)

    notes = usual(compared("trace", planted(Dropped).train(), X))
    assert len(notes) == 1
    assert "random numbers are drawn" in notes[0]


def test_no_note_stands_where_every_difference_has_its_cause():
    assert "GC220" not in {each.code for each in compared("onnx", Normalised().train(), X).findings}
