"""``import gradctl``: three checks of a model that is there already, their report, and what they leave as it was."""

from __future__ import annotations

import ast
import copy
import pickle
import random
import subprocess
import sys
import traceback
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import gradctl
from gradctl.core.findings import Report
from gradctl.report.machine import json
from gradctl.report.text import console
from sample_models import control_flow, custom_relu, mlp, straight_through, wrong_backward


class Shift(Function):
    """y = x + 1; the backward is off by the factor."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Shift.factor


class Weighted(nn.Module):
    """Two inputs, of which the second has a default; state that a call changes, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.norm(self.fc(x))
        return y if scale is None else y * scale


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.halved(x)

    def halved(self, x: Tensor) -> Tensor:
        raise ValueError("width must be even")


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr(Shift, "factor", 2.0)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def verdicts(report: gradctl.CheckReport) -> dict[str, str]:
    return {unit.form: unit.verdict for unit in report.units}


def test_importing_loads_nothing_and_naming_a_check_loads_no_torch():
    script = """
import sys
import gradctl
dir(gradctl)
gradctl.__version__
print(*[name for name in sys.modules if name.partition(".")[0] in ("gradctl", "msgspec", "numpy", "torch", "rich")])
gradctl.gradcheck, gradctl.compare, gradctl.export, gradctl.CheckFailed, gradctl.GradctlError
print(*[name for name in sys.modules if name in ("numpy", "torch", "onnx", "onnxruntime", "rich")])
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout == "gradctl\n\n"


def test_the_names_are_listed_and_another_one_is_an_attribute_error():
    assert [name for name in dir(gradctl) if not name.startswith("_")] == sorted(gradctl.__all__)
    assert "__version__" in dir(gradctl)
    with pytest.raises(AttributeError, match="module 'gradctl' has no attribute 'gradchek'"):
        gradctl.gradchek


def test_every_name_is_there_for_type_checkers_too():
    tree = ast.parse(Path(gradctl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for node in block.body for alias in node.names} == set(gradctl.__all__)


@pytest.mark.slow
def test_mypy_sees_the_types(tmp_path):
    pytest.importorskip("mypy")
    program = "import gradctl; reveal_type(gradctl.export); reveal_type(gradctl.CheckFailed.report)"
    command = [sys.executable, "-m", "mypy", "--cache-dir", "cache", "--strict", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "def (model: def (*Any, **Any) -> Any, inputs: torch._tensor.Tensor | " in finished.stdout
    assert finished.stdout.count("gradctl.check_report.CheckReport") == 2


def test_a_right_model_passes_and_raises_nothing():
    report = gradctl.gradcheck(mlp.make_model(), mlp.example_inputs())
    report.raise_if_failed()
    assert report
    assert (report.verdict, report.command, report.units[0].target) == ("pass", "gradcheck", "MLP")
    assert {tensor.tensor for tensor in report.units[0].tensors} == {
        *(f"param:{name}" for name, _ in mlp.make_model().named_parameters()),
        "input:x",
    }


def test_a_wrong_backward_fails_with_the_report_as_message():
    report = gradctl.gradcheck(wrong_backward.make_model(), wrong_backward.example_inputs())
    with pytest.raises(gradctl.CheckFailed) as caught:
        report.raise_if_failed()
    assert isinstance(caught.value, AssertionError)
    assert caught.value.report is report
    assert not report
    verdict = "FAIL: 1 of 6 gradients is wrong (gradctl explain GC408)"
    assert str(caught.value) == f"{verdict}\n\n{console.render(report).removesuffix(verdict + chr(10)).rstrip()}"
    assert str(caught.value).count(verdict) == 1
    assert caught.value.summary == "GC408 1 of 6 is wrong"
    assert "param:act.slope  float32[16]  WRONG" in str(report)
    assert str(report).endswith(f"{verdict}\n")


def test_a_failure_can_be_sent_to_another_process():
    report = gradctl.gradcheck(lambda x: torch.rand(()).item() * x + next(COUNTER), rows(3))
    sent = pickle.loads(pickle.dumps(gradctl.CheckFailed(report)))
    assert (str(sent), sent.report) == (str(gradctl.CheckFailed(report)), report)


COUNTER = iter(range(1000))


def test_what_is_inconclusive_is_no_pass_and_says_so():
    report = gradctl.gradcheck(lambda x: x * next(COUNTER), rows(3))
    assert report.verdict == "inconclusive"
    assert not report
    with pytest.raises(gradctl.CheckFailed, match="^INCONCLUSIVE: the model differs from itself when run twice"):
        report.raise_if_failed()


def test_what_checked_nothing_is_no_pass_and_says_so():
    report = gradctl.gradcheck(nn.Linear(2, 2), rows(3, 2))
    nothing = msgspec.structs.replace(report, units=(), verdict="skipped")
    with pytest.raises(gradctl.CheckFailed, match="^NOTHING CHECKED: "):
        nothing.raise_if_failed()
    assert not nothing


def test_a_report_goes_through_json():
    report = gradctl.gradcheck(wrong_backward.make_model(), wrong_backward.example_inputs())
    loaded = json.load(json.render(report).encode())
    assert isinstance(report, Report)
    assert msgspec.structs.asdict(loaded) == msgspec.structs.asdict(report)
    assert msgspec.convert(msgspec.to_builtins(loaded), gradctl.CheckReport) == report


def batch_and_scale() -> tuple[Tensor, Tensor]:
    return rows(5, 4), rows(3)


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [
        (batch_and_scale()[0], None),
        (batch_and_scale(), None),
        (list(batch_and_scale()), {}),
        ({"x": rows(5, 4), "scale": rows(3)}, None),
        ((), {"x": rows(5, 4), "scale": rows(3)}),
        (rows(5, 4), {"scale": rows(3)}),
        ({"x": rows(5, 4)}, {"scale": rows(3)}),
        (rows(5, 4).requires_grad_(), {"scale": rows(3, 2)[:, 0]}),
        (rows(5, 4).requires_grad_() * 2, None),
    ],
    ids=["tensor", "tuple", "list", "mapping", "kwargs", "tensor-kwargs", "mapping-kwargs", "leaf-strided", "non-leaf"],
)
def test_inputs_are_given_by_position_or_by_keyword(inputs, kwargs):
    report = gradctl.gradcheck(Weighted().eval(), inputs, kwargs=kwargs)
    named = {tensor.tensor for tensor in report.units[0].tensors if tensor.tensor.startswith("input:")}
    both = isinstance(inputs, (tuple, list)) or (isinstance(inputs, dict) and len(inputs) == 2) or bool(kwargs)
    assert report.verdict == "pass"
    assert named == ({"input:x", "input:scale"} if both else {"input:x"})


def test_inputs_on_one_storage_are_two_inputs():
    base = rows(6, 3)
    report = gradctl.gradcheck(lambda a, b: (a * b).sum(), (base[:3], base[3:]))
    assert report.verdict == "pass"
    assert {tensor.tensor for tensor in report.units[0].tensors} == {"input:a", "input:b"}


@pytest.mark.parametrize(
    ("inputs", "kwargs", "said"),
    [
        (3.0, None, "GC104 inputs is of type 'float'. Give a tensor, a tuple or list of the inputs in order, or a "),
        ("x", None, "GC104 inputs is of type 'str'. "),
        (None, None, "GC104 inputs is of type 'NoneType'. "),
        ((), None, "GC104 input 'x' is missing: forward takes x, scale. Add it to the inputs."),
        ({"y": rows(2)}, None, "GC104 input 'y' does not exist: forward takes x, scale"),
        ((rows(2), rows(2), rows(2)), None, "GC104 3 inputs are given by position, and forward takes x, scale."),
        ({"x": rows(2)}, {"x": rows(2)}, "GC104 input 'x' is given twice: in inputs, and in kwargs. Give it once."),
        (rows(5, 4), {"x": rows(2)}, "GC104 input 'x' is given twice: by name, and without one as number 1."),
    ],
)
def test_inputs_that_do_not_fit_are_said_in_one_sentence(inputs, kwargs, said):
    with pytest.raises(gradctl.GradctlError) as caught:
        gradctl.gradcheck(Weighted(), inputs, kwargs=kwargs)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear, "GC109 the model is the class 'Linear'. Give an object of it: Linear(…)."),
        (3, "GC109 the model is of type 'int'. Give an nn.Module, a function of tensors, or an autograd.Function."),
        (nn.Linear(2, 2, device="meta"), "GC109 Linear has parameters on the device 'meta', which hold no values. "),
    ],
)
def test_what_is_no_model_is_said_in_one_sentence(model, said):
    with pytest.raises(gradctl.GradctlError) as caught:
        gradctl.gradcheck(model, rows(2, 2))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("check", "options", "said"),
    [
        (
            "gradcheck",
            {"fail_on": "warn"},
            "GC118 fail_on='warn' cannot be (did you mean 'warning'?). There are error, ",
        ),
        ("gradcheck", {"max_sizes": 1}, "GC118 max_sizes=1 cannot be. Give a whole number from 2."),
        ("gradcheck", {"sizes": {"batch": [0]}}, "GC128 --sizes: 'batch=0' has the size 0; the smallest is 1."),
        ("gradcheck", {"sizes": {}}, "GC128 --sizes: '' has no sizes. Write, for example, 'batch=1,2,7'."),
        ("gradcheck", {"sizes": {"batch": [1.5]}}, "GC128 --sizes: 'batch=1.5' is not NAME=N,N or INPUT:AXIS=N,N. "),
        ("compare", {"sizes": "width=3"}, "GC128 --sizes: no axis has the name 'width'. "),
        ("gradcheck", {"seed": 1.5}, "GC118 seed=1.5 cannot be. Give a whole number."),
        ("gradcheck", {"probes": 0}, "GC118 probes=0 cannot be. Give a whole number from 1."),
        ("gradcheck", {"rtol": float("nan")}, "GC118 rtol=nan cannot be. Give a finite number from 0."),
        ("gradcheck", {"atol": -1.0}, "GC118 atol=-1.0 cannot be. Give a finite number from 0."),
        ("gradcheck", {"allow": "Round"}, "GC151 --allow 'Round' is no rule code with an optional name."),
        ("gradcheck", {"allow": ["GC409:x", "GC499"]}, "GC151 allow='GC499': no rule 'GC499' (did you mean "),
        ("gradcheck", {"loss": nn.MSELoss}, "GC113 the loss is a class, not a function of the outputs."),
        ("gradcheck", {"loss": 1}, "GC113 the loss is of type 'int', not a function of the outputs."),
        ("compare", {"steps": 0}, "GC118 steps=0 cannot be. Give a whole number from 1."),
        (
            "compare",
            {"steps": 1, "forms": "trace"},
            "GC118 forms='trace' cannot be. It does not apply to training steps",
        ),
        ("compare", {"optimizer": "sgd"}, "GC118 optimizer='sgd' cannot be. It applies to training steps. Give steps,"),
        ("compare", {"steps": 1, "optimizer": 3}, "GC144 the optimizer is 3. Give adamw, adam, sgd, or a function of"),
        (
            "compare",
            {"steps": 1, "variants": "accumlate"},
            "GC145 there is no variant 'accumlate' (did you mean 'accumu",
        ),
        ("compare", {"steps": 1, "variants": [3]}, "GC145 the variant 3 is no function. Give a name, or step(model, "),
        ("compare", {"forms": "exprot"}, "GC118 forms='exprot' cannot be (did you mean 'export'?). There are trace, "),
        ("compare", {"forms": ["trace", "eager"]}, "GC118 forms='eager' cannot be. There are trace, script, "),
        ("export", {"path": "m.pt2"}, "GC118 path='m.pt2' cannot be. Give a file that ends in .onnx."),
        ("export", {"path": "m.onnx", "opset": 0}, "GC118 opset=0 cannot be. Give a whole number from 1."),
        ("export", {"path": "m.onnx", "dynamic": "x"}, "GC118 dynamic: 'x' is not NAME:AXIS=SIZE, for example "),
    ],
)
def test_an_argument_that_cannot_be_is_said_in_one_sentence(check, options, said):
    with pytest.raises(gradctl.GradctlError) as caught:
        getattr(gradctl, check)(nn.Linear(2, 2), rows(3, 2), **options)
    assert str(caught.value).startswith(said)


def test_a_model_that_raises_shows_its_own_frames_and_one_sentence():
    with pytest.raises(gradctl.GradctlError) as caught:
        gradctl.gradcheck(Raises(), rows(3))
    assert str(caught.value) == "GC111 Raises raises on x=f32[3]: ValueError: width must be even."
    assert isinstance(caught.value.__cause__, ValueError)
    assert [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)] == ["forward", "halved"]
    ours = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)[1:]]
    assert {Path(file).name for file in ours} == {"api.py"}


def test_torch_s_own_error_without_a_frame_of_the_user_s_is_in_the_sentence_alone():
    with pytest.raises(gradctl.GradctlError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        gradctl.gradcheck(nn.Linear(4, 2), rows(3, 7))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_nothing_to_check_is_an_error_of_ours():
    with pytest.raises(gradctl.GradctlError, match="GC110"):
        gradctl.gradcheck(lambda i: i + 1, torch.arange(3))


@pytest.mark.parametrize("model", [Shift, Shift.apply], ids=["class", "apply"])
def test_a_function_is_judged_by_its_apply(model, planted):
    report = gradctl.gradcheck(model, rows(3))
    assert report.units[0].target == "Shift"
    assert {each.code for each in report.units[0].findings if each.severity == "error"} >= {"GC408"}


def test_the_clean_function_passes():
    assert gradctl.gradcheck(Shift, rows(3)).verdict == "pass"
    assert gradctl.gradcheck(custom_relu.ReLU, custom_relu.ReLU_inputs()).verdict == "pass"


def test_a_lambda_over_a_module_is_judged_with_its_parameters_and_leaves_it_as_it_was():
    net = Weighted()
    net(rows(5, 4)).sum().backward()
    before = snapshot(net)
    report = gradctl.compare(lambda x: net(x) ** 2, rows(5, 4), forms=["trace", "export"])
    assert verdicts(report) == dict.fromkeys(["eager", "trace", "export"], "pass")
    names = {f"param:net.{name}" for name, _ in net.named_parameters()}
    assert {tensor.tensor for tensor in report.units[0].tensors} == {*names, "input:x"}
    assert_as_before(net, before)


def test_a_loss_over_the_model_leaves_it_as_it_was():
    net = nn.Linear(4, 2)
    net(rows(5, 4)).sum().backward()
    before = snapshot(net)
    report = gradctl.gradcheck(net, rows(5, 4), loss=lambda y: y.sum() + net.weight.square().sum())
    assert report.verdict == "pass"
    assert_as_before(net, before)


def snapshot(model: nn.Module):
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    return copy.deepcopy(model.state_dict()), grads, [module.training for module in model.modules()]


def assert_as_before(model: nn.Module, before) -> None:
    state, grads, modes = before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name][0]
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name][1])
        assert parameter.requires_grad
    assert [module.training for module in model.modules()] == modes


def generators() -> list[bytes]:
    return [pickle.dumps(state) for state in (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy())]


@pytest.mark.parametrize("check", ["gradcheck", "compare", "export"])
def test_a_check_leaves_model_inputs_and_generators_as_they_were(check, tmp_path):
    model, x, scale = Weighted(), rows(5, 4).requires_grad_(), rows(3)
    model(x, scale).sum().backward()
    before, x_before, states = snapshot(model), (x.detach().clone(), x.grad, x.grad.clone()), generators()
    extra = {"compare": {"forms": ["trace", "script", "export", "aot"]}, "export": {"path": tmp_path / "m.onnx"}}
    report = getattr(gradctl, check)(model, (x, scale), **extra.get(check, {}))
    assert report.units
    assert_as_before(model, before)
    assert torch.equal(x, x_before[0]) and x.grad is x_before[1] and torch.equal(x.grad, x_before[2])
    assert generators() == states


def test_training_mode_is_noted_and_stays():
    model = Weighted()
    (note,) = [each for each in gradctl.gradcheck(model, rows(5, 4)).units[0].findings if each.code == "GC105"]
    assert note.message == (
        "the model is in training mode: 1 BatchNorm module is active; call eval() first if this is not intended"
    )
    assert model.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_check_needs_no_autograd_around_it(context):
    model = wrong_backward.make_model()
    with context():
        assert gradctl.gradcheck(model, torch.randn(8, 12)).verdict == "fail"


def test_what_the_model_prints_is_printed(capsys):
    gradctl.gradcheck(lambda x: print("seen") or x * 2, rows(2))
    assert "seen\n" in capsys.readouterr().out


def test_an_accepted_finding_passes_and_one_that_is_gone_is_noted(planted):
    assert gradctl.gradcheck(Shift, rows(3)).verdict == "fail"
    accepted = gradctl.gradcheck(lambda x: 2 * x + Shift.apply(x), rows(3), allow="GC408:Shift")
    accepted.raise_if_failed()
    assert [(each.allow, each.applied) for each in accepted.allows] == [("GC408:Shift", True)]
    gone = gradctl.gradcheck(nn.Linear(2, 2), rows(3, 2), allow=["GC408:Shift"])
    assert "note GC150 --allow GC408:Shift accepted nothing in this run." in str(gone)


def test_the_mildest_finding_that_fails_is_the_callers_choice():
    model = Weighted()
    assert gradctl.gradcheck(model, rows(5, 4)).verdict == "pass"
    assert gradctl.gradcheck(model, rows(5, 4), fail_on="note").verdict == "fail"


def test_a_loss_a_glob_and_tolerances_are_passed_on():
    model, inputs = wrong_backward.make_model(), wrong_backward.example_inputs()
    fitted = gradctl.gradcheck(model, inputs, tensor="param:fc2.*", loss=lambda y: y.square().mean())
    assert [tensor.tensor for tensor in fitted.units[0].tensors] == ["param:fc2.weight", "param:fc2.bias"]
    assert fitted.verdict == "pass"
    assert gradctl.gradcheck(Shift.apply, rows(3), rtol=0.5).verdict == "pass"


def test_a_place_is_never_that_of_the_call_of_the_check():
    report = gradctl.gradcheck(nn.Embedding(9, 3, scale_grad_by_freq=True), torch.tensor([1, 1, 2]))
    (hook,) = report.units[0].findings
    assert (hook.code, hook.location) == ("GC409", None)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))  # its power iteration is no part of a trace
    traced = gradctl.compare(normed, rows(2, 3), forms="trace").units[1]
    assert [(each.code, each.location and each.location.file) for each in traced.findings] == [("GC303", None)]


def test_every_form_but_inductor_s_is_compared_here():
    report = gradctl.compare(mlp.make_model(), mlp.example_inputs(), forms=["trace", "script", "export", "aot", "onnx"])
    assert verdicts(report) == dict.fromkeys(["eager", "trace", "script", "export", "aot", "onnx"], "pass")
    assert str(report).endswith("PASS: 6 of 6 forms agree\n")


@pytest.mark.slow
def test_without_a_choice_all_forms_are_compared():
    report = gradctl.compare(mlp.make_model(), mlp.example_inputs())
    assert list(verdicts(report)) == ["eager", "trace", "script", "export", "aot", "compile", "onnx"]
    assert report.verdict == "pass"


def test_a_form_that_loses_a_gradient_fails_by_name():
    report = gradctl.compare(
        straight_through.make_model(),
        straight_through.example_inputs(),
        forms="export",
        allow="GC408:RoundStraightThrough",
    )
    assert verdicts(report) == {"eager": "pass", "export": "fail"}
    with pytest.raises(gradctl.CheckFailed, match="param:encoder.weight"):
        report.raise_if_failed()


def test_a_named_form_that_refuses_the_model_is_inconclusive():
    report = gradctl.compare(control_flow.make_model(), control_flow.example_inputs(), forms=["export"])
    assert verdicts(report) == {"eager": "pass", "export": "inconclusive"}
    with pytest.raises(gradctl.CheckFailed, match="^INCONCLUSIVE: 1 of 2 forms not decided"):
        report.raise_if_failed()


def test_an_exported_file_is_what_onnxruntime_runs(tmp_path):
    import onnxruntime

    model, (x,) = mlp.make_model(), mlp.example_inputs()
    path = tmp_path / "mlp.onnx"
    report = gradctl.export(model, x, path, dynamic="x:0=batch", opset=20)
    report.raise_if_failed()
    more = torch.cat([x, x])
    (output,) = onnxruntime.InferenceSession(path).run(None, {"x": more.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(more).detach(), rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_be_exported_leaves_no_file_and_is_no_pass(tmp_path):
    report = gradctl.export(control_flow.make_model(), control_flow.example_inputs(), str(tmp_path / "m.onnx"))
    assert report.verdict == "inconclusive"
    assert list(tmp_path.iterdir()) == []


def test_training_steps_are_compared_with_a_step_and_an_optimizer_of_ones_own():
    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean() * 1.001
        loss.backward()
        optimizer.step()
        return loss / 1.001

    def loss(outputs):
        return outputs.square().mean()

    def optimizer(parameters):
        made = torch.optim.SGD(parameters, lr=0.1)
        return made, torch.optim.lr_scheduler.ExponentialLR(made, 0.5)

    model = nn.Linear(2, 3)
    report = gradctl.compare(model, rows(3, 2), steps=2, variants=["foreach", step], optimizer=optimizer, loss=loss)
    assert [unit.verdict for unit in report.units] == ["pass", "fail"]
    (finding,) = report.units[1].findings
    assert "step: the gradient of param:bias differs from the plain step's at step 1: relative error 1.0e-03" in str(
        finding
    )
    assert finding.location.file == "tests/test_api.py"
    assert model.weight.grad is None


def test_sizes_are_a_mapping_or_the_text_of_the_command_line():
    reports = [gradctl.gradcheck(torch.sin, rows(2, 3), sizes=sizes) for sizes in ({"batch": [1, 4]}, "batch=1,4")]
    assert all(reports)
    assert reports[0].units[0].variations == reports[1].units[0].variations
    assert reports[0].units[0].variations[:2] == ("batch=1", "batch=4")


def test_forms_are_compared_at_sizes():
    report = gradctl.compare(nn.Linear(3, 2), rows(2, 3), forms="trace", sizes={"batch": 4})
    assert report
    assert [unit.form for unit in report.units] == ["eager", "trace"]
    assert all("batch=4, transposed" in unit.variations for unit in report.units)


def test_a_snapshot_is_verified_on_its_own_values(tmp_path):
    path = tmp_path / "net.snapshot"
    model = Weighted()
    report = gradctl.snapshot(model, {"x": rows(5, 4), "scale": rows(5, 3)}, path, seed=3)
    assert (report.verdict, report.command) == ("pass", "snapshot")
    assert (report.units[0].findings[-1].code, report.units[0].findings[-1].message) == (
        "GC139",
        f"{path} was written.",
    )
    other = Weighted()  # other parameters: those of the snapshot are used, and its inputs
    assert not torch.equal(other.fc.weight, model.fc.weight)
    verified = gradctl.verify(path, other)
    assert (verified.verdict, verified.command, verified.seed) == ("pass", "verify", 3)
    assert gradctl.verify(path, other, (rows(5, 4), rows(5, 3))).verdict == "pass"


def test_a_change_is_found_and_update_rewrites_it(tmp_path):
    path = tmp_path / "f.snapshot"
    gradctl.snapshot(lambda x: torch.tanh(1 * x), rows(3), path)
    changed = gradctl.verify(path, lambda x: torch.tanh(1.001 * x), rows(3))
    assert changed.verdict == "fail"
    assert {each.code for each in changed.units[0].findings if each.severity == "error"} == {"GC310", "GC311"}
    assert gradctl.verify(path, torch.sigmoid, rows(3), update=True)
    assert gradctl.verify(path, torch.sigmoid, rows(3))
    assert gradctl.verify(tmp_path / "new" / "f.snapshot", torch.sigmoid, rows(3), update=True)
    assert (tmp_path / "new" / "f.snapshot").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": True, "dtype": "bf16"}, "GC118 update=True cannot be. The CPU computes what a snapshot holds"),
        ({"dtype": "bfloat16"}, "GC118 dtype='bfloat16' cannot be.* There are "),
        ({}, "GC133 there is no file '.*gone.snapshot'"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence(tmp_path, options, said):
    with pytest.raises(gradctl.GradctlError, match=said):
        gradctl.verify(tmp_path / "gone.snapshot", torch.tanh, **options)


def test_inputs_that_are_no_tensors_by_name_have_to_be_given(tmp_path):
    path = tmp_path / "f.snapshot"

    def total(values):
        return values["a"] * values["b"]

    inputs = {"values": {"a": rows(3), "b": rows(3)}}
    gradctl.snapshot(total, inputs, path)
    with pytest.raises(
        gradctl.GradctlError, match=r"GC135 .* does not hold the input values\.a, values\.b as the model"
    ):
        gradctl.verify(path, total)
    assert gradctl.verify(path, total, inputs)
