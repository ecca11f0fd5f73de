"""``gradctl export --graph joint`` as a process; its file is run by numpy and onnxruntime, and torch is the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject
from tests.cli.command_line import gradctl
from tests.sweeps import sampled

SAMPLES = Path(__file__).parents[3] / "sample_models"

# What a user without torch runs: all inputs from one file of arrays, all that comes out into another.
RUNS_IT = """
import sys
import numpy as np
import onnxruntime
assert "torch" not in sys.modules
session = onnxruntime.InferenceSession(sys.argv[1])
names = [each.name for each in session.get_outputs()]
found = session.run(names, dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **dict(zip(names, found)))
"""


def by_autograd(subject):
    """Return feeds of a joint graph, and what it is to give, by autograd."""
    model, (given, *_) = subject.model, subject.args
    leaf = given.clone().requires_grad_(given.is_floating_point())
    given_out = model(leaf)
    outputs = (
        {"output": given_out}
        if isinstance(given_out, torch.Tensor)
        else {f"output.{place}": each for place, each in enumerate(given_out)}
    )
    generator = torch.Generator().manual_seed(3)
    cotangents = {name: torch.randn(each.shape, generator=generator) for name, each in outputs.items()}
    torch.autograd.backward(list(outputs.values()), list(cotangents.values()))
    name = next(iter(subject.model.forward.__code__.co_varnames[1:]))
    feeds = {f"input.{name}": given, **dict(model.named_parameters())}
    feeds |= {f"grad_{name}": each for name, each in cotangents.items()}
    wanted = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted |= {f"grad.input.{name}": leaf.grad} if leaf.grad is not None else {}
    return {key: value.detach().numpy() for key, value in feeds.items()}, {**outputs, **wanted}


def run_alone(folder, path, feeds):
    np.savez(folder / "feeds.npz", **feeds)
    line = [sys.executable, "-c", RUNS_IT, path, folder / "feeds.npz", folder / "found.npz"]
    subprocess.run(line, check=True, timeout=120)
    return dict(np.load(folder / "found.npz"))


SAMPLED = ["resnet", "straight_through", "gradient_reversal", "no_grad_inside", "straight_through_detach"]


@pytest.mark.parametrize("sample", sampled(SAMPLED, always=["resnet", "straight_through", "no_grad_inside"]))
def test_onnxruntime_alone_gives_the_gradients_of_autograd(sample, tmp_path):
    path = tmp_path / "joint.onnx"
    finished = gradctl("export", SAMPLES / f"{sample}.py", "--graph", "joint", "-o", path)
    assert (finished.returncode, finished.stderr) == (0, "")
    subject = load_subject(TargetOptions(str(SAMPLES / f"{sample}.py")))
    own = list(subject.model.parameters())
    counted = f"{len(own)} parameter{'s' * (len(own) > 1)}, {sum(each.numel() for each in own)} elements; "
    assert finished.stdout.startswith(counted)
    feeds, wanted = by_autograd(subject)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    taken = {each.name for each in model.graph.input}
    found = run_alone(tmp_path, path, {name: value for name, value in feeds.items() if name in taken})
    assert set(wanted) == set(found)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_free_batch_has_gradients_at_any_size(tmp_path):
    path = tmp_path / "joint.onnx"
    finished = gradctl("export", SAMPLES / "mlp.py", "--graph", "joint", "--dynamic", "x:0=batch", "-o", path)
    assert finished.returncode == 0
    session = onnxruntime.InferenceSession(path)
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert (shapes["input.x"][0], shapes["grad_output"][0]) == ("batch", "batch")
    model = load_subject(TargetOptions(str(SAMPLES / "mlp.py"))).model
    for batch in (1, 3, 17):
        x, cotangent = torch.randn(batch, 32, requires_grad=True), torch.randn(batch, 10)
        model.zero_grad()
        model(x).backward(cotangent)
        feeds = {name: p.detach().numpy() for name, p in model.named_parameters()}
        feeds |= {"input.x": x.detach().numpy(), "grad_output": cotangent.numpy()}
        (by_x, by_weight) = session.run(["grad.input.x", "grad.fc1.weight"], feeds)
        np.testing.assert_allclose(by_x, x.grad.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_weight, model.fc1.weight.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_frozen_and_by_the_inputs_alone(tmp_path):
    path = tmp_path / "forces.onnx"
    finished = gradctl(
        "export", SAMPLES / "mlp.py", "--graph", "joint", "--wrt", "input:*", "--freeze", "-o", path
    )  # fmt: skip
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 1 gradient agrees with eager")
    graph = onnx.load(path).graph
    assert [each.name for each in graph.input] == ["input.x", "grad_output"]
    assert [each.name for each in graph.output] == ["output", "grad.input.x"]
    assert {"fc1.bias", "fc2.bias", "fc3.bias"} <= {each.name for each in graph.initializer}


WITH_LOSS = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x, target):
        return self.fc(x)

def make_model():
    torch.manual_seed(0)
    return Net()

def cross_entropy(output, x, target):
    return F.cross_entropy(output, target, label_smoothing=0.1)

def example_inputs():
    return (torch.randn(5, 6), torch.tensor([0, 1, 3, 2, 1]))
"""


def test_a_loss_is_in_the_graph(tmp_path):
    (tmp_path / "net.py").write_text(WITH_LOSS)
    path = tmp_path / "joint.onnx"
    free = ("--dynamic", "x:0=batch", "--dynamic", "target:0=batch")
    finished = gradctl("export", tmp_path / "net.py", "--loss", "cross_entropy", "--graph", "joint", *free, "-o", path)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 3 gradients agree with eager")
    model = load_subject(TargetOptions(str(tmp_path / "net.py"))).model
    x, target = torch.randn(7, 6), torch.randint(0, 4, (7,))
    loss = torch.nn.functional.cross_entropy(model(x, target), target, label_smoothing=0.1)
    loss.backward()
    feeds = {name: p.detach().numpy() for name, p in model.named_parameters()}
    feeds |= {"input.x": x.numpy(), "input.target": target.numpy(), "grad_output": np.array(1, np.float32)}
    found = onnxruntime.InferenceSession(path).run(["output", "grad.fc.weight"], feeds)
    np.testing.assert_allclose(found[0], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(found[1], model.fc.weight.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_a_program_of_torch_with_a_free_batch(tmp_path):
    """The names of what it takes and gives are in the file, in their order."""
    path = tmp_path / "joint.pt2"
    finished = gradctl("export", SAMPLES / "mlp.py", "--graph", "joint", "--dynamic", "x:0=batch", "-o", path)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 7 gradients agree with eager")
    kept = {"gradctl.json": ""}
    program = torch.export.load(path, extra_files=kept)
    names = json.loads(kept["gradctl.json"])
    model = load_subject(TargetOptions(str(SAMPLES / "mlp.py"))).model
    x, cotangent = torch.randn(13, 32, requires_grad=True), torch.randn(13, 10)
    model(x).backward(cotangent)
    values = {**dict(model.named_parameters()), "input.x": x, "grad_output": cotangent}
    with torch.no_grad():
        found = program.module()(*(values[name].detach() for name in names["inputs"]))
    gradients = dict(zip(names["outputs"], found, strict=True))
    torch.testing.assert_close(gradients["grad.input.x"], x.grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"grad.{name}"], parameter.grad)


def test_a_program_of_torch_is_held_against_the_model(tmp_path):
    path = tmp_path / "joint.pt2"
    only = ("--wrt", "param:fc1.*")
    assert gradctl("export", SAMPLES / "mlp.py", "--graph", "joint", *only, "-o", path).returncode == 0
    finished = gradctl("compare", SAMPLES / "mlp.py", path, "--trust")
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 2 gradients agree with eager")
    assert "GC901" in gradctl("compare", SAMPLES / "mlp.py", path).stderr
    other = gradctl("compare", SAMPLES / "linear.py", path, "--trust")
    assert other.returncode == 2
    assert "joint.pt2 is not a joint graph of" in other.stderr
    assert "it has the unknown input 'fc1.weight'" in other.stderr


def test_optimize_takes_a_joint_file(tmp_path):
    path, output = tmp_path / "joint.onnx", tmp_path / "faster.onnx"
    assert gradctl("export", SAMPLES / "mlp.py", "--graph", "joint", "-o", path).returncode == 0
    finished = gradctl("optimize", path, "-o", output)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, f"PASS: 8 outputs agree with {path}")


def test_a_joint_file_is_held_against_the_model(tmp_path):
    """As long as it is of its weights: frozen ones are in the file."""
    path = tmp_path / "joint.onnx"
    frozen = ("--graph", "joint", "--wrt", "param:fc1.*", "--freeze")
    assert gradctl("export", SAMPLES / "mlp.py", *frozen, "-o", path).returncode == 0
    finished = gradctl("compare", SAMPLES / "mlp.py", path)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 2 gradients agree with eager")
    weights = {
        name: 1.1 * p.detach()
        for name, p in load_subject(TargetOptions(str(SAMPLES / "mlp.py"))).model.named_parameters()
    }
    torch.save(weights, tmp_path / "other.pt")
    finished = gradctl("compare", SAMPLES / "mlp.py", path, "--weights", tmp_path / "other.pt")
    assert (finished.returncode, "2 of 2 gradients are wrong" in finished.stdout) == (1, True)
    finished = gradctl("compare", SAMPLES / "linear.py", path)
    assert (finished.returncode, "is not a joint graph of" in finished.stderr) == (2, True)


WITH_DROPOUT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.drop(self.fc1(x).tanh()))

def make_model():
    torch.manual_seed(0)
    return Net()

def example_inputs():
    return (torch.randn(5, 6),)
"""


def test_a_dropout_mask_is_an_input_that_the_caller_draws(tmp_path):
    """How is in the metadata; a batch of another size has a mask of another size."""
    (tmp_path / "net.py").write_text(WITH_DROPOUT)
    path = tmp_path / "joint.onnx"
    finished = gradctl("export", tmp_path / "net.py", "--graph", "joint", "--dynamic", "x:0=batch", "-o", path)
    assert finished.returncode == 0
    *_, drawn, written, _, verdict = finished.stdout.splitlines()
    assert drawn == "random inputs: random.drop (bernoulli, p = 0.75)"
    assert (written, verdict) == (f"{path} is written", "PASS: 5 gradients agree with eager")
    session = onnxruntime.InferenceSession(path)
    said = json.loads(session.get_modelmeta().custom_metadata_map["random.drop"])
    assert said == {"distribution": "bernoulli", "p": 0.75}
    assert {each.name: each.shape for each in session.get_inputs()}["random.drop"] == ["batch", 8]
    model = load_subject(TargetOptions(str(tmp_path / "net.py"))).model
    x, cotangent = torch.randn(7, 6, requires_grad=True), torch.randn(7, 3)
    feeds = {name: p.detach().numpy() for name, p in model.named_parameters()}
    feeds |= {"input.x": x.detach().numpy(), "grad_output": cotangent.numpy()}
    for mask in (torch.ones(7, 8), torch.empty(7, 8).bernoulli_(0.75)):
        x.grad = None
        output = model.fc2(model.fc1(x).tanh() * mask / 0.75)
        output.backward(cotangent)
        found = session.run(["output", "grad.input.x"], {**feeds, "random.drop": mask.numpy()})
        np.testing.assert_allclose(found[0], output.detach().numpy(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], x.grad.numpy(), rtol=1e-4, atol=1e-6)
    finished = gradctl("compare", tmp_path / "net.py", path, "--train")
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 5 gradients agree with eager")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (
            ("mlp.py", "--wrt", "input:x"),
            2,
            "--wrt applies to graphs with derivatives: a forward graph has no gradients.",
        ),
        (("mlp.py", "--freeze"), 2, "--freeze applies to --graph joint, jvp and hvp, not to forward."),
        (
            ("mlp.py", "--graph", "joint", "--wrt", "input:z"),
            2,
            "--wrt input:z matches nothing that requires a gradient (did you mean 'input:x'?): there are param:",
        ),
        (
            ("mlp.py", "--graph", "joint", "--freeze", "-o", "joint.pt2"),
            2,
            "--freeze applies to an .onnx file, not to .pt2.",
        ),
        (
            ("transformer.py", "--graph", "jvp"),
            2,
            "GC104 --graph jvp differentiates by float inputs, and",
        ),
        (
            ("mlp.py", "--graph", "hvp"),
            2,
            "returns output of shape [8, 10]. Add --loss NAME, a function of the outputs that returns a scalar.",
        ),
        (
            ("mlp.py", "--graph", "jvp", "--wrt", "param:fc9.*"),
            2,
            "--wrt param:fc9.* matches nothing that requires a gradient",
        ),
        (
            ("mlp.py", "--graph", "train-step", "-o", "step.pt2"),
            2,
            "step.pt2: export writes .onnx, and .pt2 but for --graph train-step.",
        ),
        (
            ("control_flow.py", "--graph", "joint"),
            4,
            "depends on the values of a tensor (control_flow.py, line 2",
        ),
    ],
)
def test_what_cannot_be_had_is_said_and_leaves_no_file(arguments, exit_code, said, tmp_path):
    target, *options = arguments
    finished = gradctl("export", SAMPLES / target, "-o", tmp_path / "joint.onnx", *options, cwd=tmp_path)
    assert finished.returncode == exit_code
    assert said in " ".join((finished.stdout + finished.stderr).split())
    assert list(tmp_path.iterdir()) == []


NET = """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        {}

def make_model():
    return Net()
"""
REFUSED = {
    "an input that is written to": (
        NET.format("return self.fc(x.mul_(2))"),
        "torch.ones(2, 4)",
        "the model writes to its input 'x' (net.py, line 10), which no graph can: clone it first.",
    ),
    "a branch on values": (
        NET.format("return self.fc(x) if x.sum() > 0 else -self.fc(x)"),
        "torch.ones(2, 4)",
        "a branch, a loop, a size or a number depends on the values of a tensor (net.py, line 10): keep it a tensor, "
        "and choose with torch.where.",
    ),
    "an operator that ONNX lacks": (
        NET.format("return torch.linalg.eigvalsh(self.fc(x) + self.fc(x).T)"),
        "torch.ones(4, 4)",
        "ONNX has no operator for aten._linalg_eigh (net.py, line 10): compute it outside of the model, and pass the "
        "result as an input.",
    ),
    "two values of one name": (  # a submodule called input, and an input called weight
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.input = nn.Linear(4, 4)\n\n"
        "    def forward(self, weight):\n        return self.input(weight)\n\n"
        "def make_model():\n    return Net()\n",
        "torch.ones(2, 4)",
        "two values of the graph would be called 'input.weight'",
    ),
    "bfloat16": (
        "def make_model():\n    return nn.Linear(4, 4).bfloat16()\n",
        "torch.ones(2, 4, dtype=torch.bfloat16)",
        "'weight' is bfloat16, which onnxruntime does not support on the CPU: use float32.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_say_is_refused(name, tmp_path):
    source, given, said = REFUSED[name]
    inputs = f"def example_inputs():\n    return ({given},)\n"
    (tmp_path / "net.py").write_text(f"import torch\nfrom torch import nn\n\n{source}\n{inputs}")
    finished = gradctl("export", tmp_path / "net.py", "--graph", "joint", "-o", tmp_path / "joint.onnx")
    assert (finished.returncode, finished.stderr) == (4, "")
    assert said in " ".join(finished.stdout.split())
    assert not (tmp_path / "joint.onnx").exists()
