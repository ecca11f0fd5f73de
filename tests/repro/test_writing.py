"""``--repro``: the program that is written fails by plain Python without gradctl, and passes once the bug is mended."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradctl.commands.compare import compare
from gradctl.core.target_options import TargetOptions
from gradctl.gradients.gradcheck import gradcheck
from gradctl.repro.writing import write_repros
from gradctl.subject.loading.load import load_subject

MODELS = Path(__file__).parents[2] / "sample_models"
# Imported by every Python that starts with its folder on PYTHONPATH.
WITHOUT_GRADCTL = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gradctl":
            raise AssertionError("a repro.py imports gradctl")

sys.meta_path.insert(0, Blocker())
"""

HOOKED = """
import torch
from torch import nn

class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.fc(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: 2 * gradient)
        return h.tanh()

class Stack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 4), Doubled(), nn.Linear(4, 2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"y": x}

def make_model(width: int) -> nn.Module:
    return Stack(width)

def example_inputs():
    return (torch.randn(6, 3),)
"""

NAN = """
import torch
from torch import nn

class Root(nn.Module):
    def forward(self, h):
        return torch.where(h > 0, h.sqrt(), torch.zeros_like(h))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.root = Root()

    def forward(self, x):
        return self.root(self.fc(x))

def Net_inputs():
    return (torch.randn(6, 4),)
"""

WRONG_BEHIND_A_CUT = """
import torch
from torch import nn

class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos() * 1.01

class Act(nn.Module):
    def forward(self, x):
        return Sine.apply(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = Act()

    def forward(self, x):
        h = self.act(self.fc(x))
        return h * h.norm().detach()

def Net_inputs():
    return (torch.randn(6, 4),)
"""


def written(tmp_path, target, *, forms=(), allows=(), **options):
    """Return the finished units, and what was said of findings without a program, for a target."""
    checking = TargetOptions(target=str(target), **options)
    arguments = options.get("arguments", ())
    subject = load_subject(TargetOptions(checking.target, arguments=arguments, loss=checking.loss, seed=checking.seed))
    units = compare(subject, forms=forms, allows=allows) if forms else [gradcheck(subject, allows=allows)]
    said = []
    units = write_repros(units, checking, subject, tmp_path / "repros", allows=allows, say=said.append)
    return units, said


def scripts(units):
    """Return the path of each program by form and code."""
    found = {(unit.form, finding.code): finding.repro for unit in units for finding in unit.findings if finding.repro}
    return {key: Path(path) for key, path in found.items()}


def run_plainly(script, tmp_path):
    """Return the finished process of a script, in a Python that refuses to import gradctl."""
    blocker = tmp_path / "blocker"
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text(WITHOUT_GRADCTL, encoding="utf-8")
    return subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(blocker), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def mend(script, old, new):
    """Change the user's code in the copy beside a script."""
    (file,) = [each for each in (script.parent / "source").rglob("*.py") if old in each.read_text(encoding="utf-8")]
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def assert_fails_until_mended(script, tmp_path, old, new):
    text = script.read_text(encoding="utf-8")
    assert re.search(r"^\s*(?:import|from) gradctl", text, re.MULTILINE) is None
    broken = run_plainly(script, tmp_path)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "the bug is there" in broken.stdout
    mend(script, old, new)
    mended = run_plainly(script, tmp_path)
    assert mended.returncode == 0, mended.stdout + mended.stderr


@pytest.mark.slow
def test_a_wrong_backward_comes_down_to_its_module_and_two_rows(tmp_path):
    units, said = written(tmp_path, MODELS / "wrong_backward.py")
    (script,) = scripts(units).values()
    assert said == []
    tensors = load_file(script.parent / "tensors.safetensors")
    # A mean over one row is its sum: the mistake needs two.
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.slope": (16,),
        "inputs.0.0": (2, 16),
    }
    assert_fails_until_mended(script, tmp_path, ".mean(0)", ".sum(0)")


@pytest.mark.slow
def test_the_text_is_fit_for_a_report_upstream(tmp_path):
    units, _ = written(tmp_path, MODELS / "straight_through.py", forms=["export"])
    script = scripts(units)["export", "GC402"]
    docstring = script.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0]
    assert docstring.startswith("torch.export computes another gradient than eager.\n")
    for said in ("What happens: ", "What is expected: ", "--form export (seed 0, GC402)", f"torch {torch.__version__}"):
        assert said in " ".join(docstring.split())
    assert_fails_until_mended(
        script,
        tmp_path,
        "RoundStraightThrough.apply(4 * self.encoder(x).tanh())",
        "(lambda h: h + (h.round() - h).detach())(4 * self.encoder(x).tanh())",
    )


@pytest.mark.slow
def test_a_reversed_gradient_that_export_drops(tmp_path):
    units, _ = written(tmp_path, MODELS / "gradient_reversal.py", forms=["export"], allows=("GC408:ReverseGradient",))
    script = scripts(units)["export", "GC402"]
    assert_fails_until_mended(script, tmp_path, "ReverseGradient.apply(h)", "h.sin()")


@pytest.mark.slow
def test_a_branch_that_trace_bakes_in_shows_on_other_inputs_than_the_example(tmp_path):
    units, _ = written(tmp_path, MODELS / "control_flow.py", forms=["trace"])
    script = scripts(units)["trace", "GC301"]
    names = load_file(script.parent / "tensors.safetensors").keys()
    assert {"example.0.0", "inputs.0.0"} <= names
    mend(script, "while h.norm() > 1:", "for _ in range(2):")
    assert_fails_until_mended(
        script,
        tmp_path,
        "expert = self.positive if self.gate(x).sum() > 0 else self.negative\n        h = expert(x).tanh()",
        "h = torch.where(self.gate(x).sum() > 0, self.positive(x), self.negative(x)).tanh()",
    )


@pytest.mark.slow
def test_a_hook_that_export_drops_comes_down_to_the_block_that_sets_it(tmp_path):
    target = tmp_path / "hooked.py"
    target.write_text(HOOKED, encoding="utf-8")
    units, _ = written(tmp_path, target, forms=["export"], arguments=("width=3",))
    script = scripts(units)["export", "GC402"]
    tensors = load_file(script.parent / "tensors.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.fc.weight": (4, 4),
        "model.fc.bias": (4,),
        "inputs.0.0": (1, 4),
    }
    assert_fails_until_mended(script, tmp_path, "2 * gradient", "gradient")


@pytest.mark.slow
def test_a_gradient_that_is_nan_comes_down_to_the_module_that_makes_it(tmp_path):
    target = tmp_path / "nan.py"
    target.write_text(NAN, encoding="utf-8")
    units, _ = written(tmp_path, f"{target}:Net")
    script = scripts(units)["eager", "GC407"]
    assert load_file(script.parent / "tensors.safetensors").keys() == {"inputs.0.0"}
    assert_fails_until_mended(script, tmp_path, "h.sqrt()", "torch.where(h > 0, h, torch.ones_like(h)).sqrt()")


@pytest.mark.slow
def test_finite_differences_of_a_script_are_taken_where_nothing_is_cut(tmp_path):
    target = tmp_path / "cut.py"
    target.write_text(WRONG_BEHIND_A_CUT, encoding="utf-8")
    units, _ = written(tmp_path, f"{target}:Net")
    script = scripts(units)["eager", "GC408"]
    assert "get_submodule('act')" in script.read_text(encoding="utf-8")
    # Of the whole model they would move what detach cuts, and differ from a right gradient too.
    assert_fails_until_mended(script, tmp_path, "* 1.01", "")


@pytest.mark.slow
def test_a_function_by_its_class(tmp_path):
    target = tmp_path / "sine.py"
    target.write_text(f"{WRONG_BEHIND_A_CUT}\ndef Sine_inputs():\n    return (torch.randn(5, 4),)\n", encoding="utf-8")
    units, _ = written(tmp_path, f"{target}:Sine")
    script = scripts(units)["eager", "GC408"]
    assert load_file(script.parent / "tensors.safetensors")["inputs.0.0"].shape == (1, 4)
    assert_fails_until_mended(script, tmp_path, "* 1.01", "")


def test_a_script_that_cannot_be_run_says_nothing_of_the_bug(tmp_path):
    target = tmp_path / "sine.py"
    target.write_text(f"{WRONG_BEHIND_A_CUT}\ndef Sine_inputs():\n    return (torch.randn(5, 4),)\n", encoding="utf-8")
    units, _ = written(tmp_path, f"{target}:Sine")
    script = scripts(units)["eager", "GC408"]
    mend(script, "import torch\n", "import torch, no_such_package\n")
    finished = run_plainly(script, tmp_path)
    assert finished.returncode == 2
    assert "No module named 'no_such_package'" in finished.stderr
    assert "says nothing of the bug" in finished.stderr


@pytest.mark.slow
def test_one_program_a_code_also_where_many_gradients_are_wrong(tmp_path):
    units, said = written(tmp_path, MODELS / "straight_through.py", forms=["export"])
    wrong = [finding for finding in units[1].findings if finding.code == "GC402"]
    assert len(wrong) > 1
    assert [finding.repro is not None for finding in wrong] == [True] + [False] * (len(wrong) - 1)
    assert said == []


def test_a_program_that_would_not_fail_is_not_written(tmp_path, monkeypatch):
    target = tmp_path / "once.py"
    body = WRONG_BEHIND_A_CUT.replace("* 1.01", "* FACTOR").replace(
        "class Sine", "import os\n\nFACTOR = 1.01 if os.environ.get('BROKEN') else 1.0\n\nclass Sine"
    )
    target.write_text(f"{body}\ndef Sine_inputs():\n    return (torch.randn(5, 4),)\n", encoding="utf-8")
    monkeypatch.setenv("BROKEN", "1")
    subject = load_subject(TargetOptions(f"{target}:Sine"))
    units = [gradcheck(subject)]
    assert units[0].verdict == "fail"
    monkeypatch.delenv("BROKEN")
    said = []
    checking = TargetOptions(target=f"{target}:Sine")
    units = write_repros(units, checking, subject, tmp_path / "repros", say=said.append)
    assert scripts(units) == {}
    assert said == ["no repro for GC408 (eager): a script of plain torch does not show it."]
    assert list((tmp_path / "repros").iterdir()) == []


def test_an_input_that_is_no_tensor_number_or_text_is_named(tmp_path):
    target = tmp_path / "odd.py"
    body = "\nclass Options: pass\n\ndef f(x, options):\n    return Sine.apply(x)\n"
    inputs = "\ndef f_inputs():\n    return torch.randn(5, 4), Options()\n"
    target.write_text(WRONG_BEHIND_A_CUT + body + inputs, encoding="utf-8")
    units, said = written(tmp_path, f"{target}:f")
    assert scripts(units) == {}
    assert said == [
        "no repro for GC408 (eager): inputs.0.1 is of type 'Options', which a script cannot be given.",
    ]


def test_a_model_without_a_target_has_none(tmp_path):
    subject = load_subject(TargetOptions(str(MODELS / "wrong_backward.py")))
    said = []
    checking = TargetOptions(target="a model made here")
    write_repros([gradcheck(subject)], checking, subject, tmp_path / "repros", say=said.append)
    assert len(said) == 1
    assert said[0].startswith("no repro for GC408 (eager): its model cannot be made anew from a target (GC101 ")


@pytest.mark.parametrize("allows", [("GC408",), ()])
def test_what_is_accepted_has_none(tmp_path, allows):
    units, said = written(tmp_path, MODELS / "straight_through.py", allows=allows)
    assert (len(scripts(units)), said) == (0 if allows else 1, [])
