"""What cannot be exported as a training step is one sentence with an exit code, and leaves no file."""

from __future__ import annotations

import pytest

from tests.cli.command_line import gradctl

MODELS = """
import torch
from torch import nn

def example_inputs():
    return {"x": torch.arange(12).reshape(3, 4) % 5}

class Net(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.embedding, self.unused = nn.Embedding(5, 3, sparse=sparse), nn.Linear(2, 2)
    def forward(self, x):
        return self.embedding(x)

class Detached(Net):
    def forward(self, x):
        return self.embedding(x).detach()

class Branching(Net):
    def forward(self, x):
        y = self.embedding(x)
        return y if y.sum() > 0 else -y

def make_sparse():
    return Net(sparse=True)

def mse(y):
    return y.square().mean()

def by_row(y):
    return y.square().mean(-1)

def misspelt(parameters):
    return torch.optim.AdamW(parameters, weight_deacy=0.1)

def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""


@pytest.mark.parametrize(
    ("target", "options", "exit_code", "said"),
    [
        ("Net", "", 2, "GC113 net.py:Net returns no scalar to minimise. Add --loss NAME"),
        ("Net", "--loss by_row", 2, "GC113 the loss returns a tensor of shape [3, 4], not a scalar"),
        ("Net", "--loss mse --optimizer rmsprop", 2, "GC144 there is no optimizer 'rmsprop'"),
        ("Net", "--loss mse --optimizer net.py:misspelt", 2, "unexpected keyword argument 'weight_deacy'"),
        ("Net", "--loss mse --clip-norm 0", 2, "Invalid value for '--clip-norm': 0.0 is not in the range x>0."),
        (
            "Net",
            "--loss mse --wrt param:unused.*",
            2,
            "GC113 the loss requires no gradient: it depends on no parameter",
        ),
        ("Detached", "--loss mse", 2, "GC113 the loss requires no gradient: it depends on no parameter"),
        (
            "make_sparse",
            "--loss mse",
            2,
            "GC144 the optimizer adamw raises in step(): RuntimeError: Adam does not supp",
        ),
        (
            "make_sparse",
            "--loss mse --optimizer net.py:momentum",
            4,
            "(the backward of net.py, line 13): use dense ten",
        ),
        ("Branching", "--loss mse", 4, "depends on the values of a tensor (net.py, line 22)"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(tmp_path, target, options, exit_code, said):
    (tmp_path / "net.py").write_text(MODELS)
    arguments = [f"net.py:{target}", "--graph", "train-step", "-o", "step.onnx", *options.split()]
    finished = gradctl("export", *arguments, cwd=tmp_path)
    printed = " ".join((finished.stdout + finished.stderr).split())
    assert (finished.returncode, said in printed) == (exit_code, True), printed
    assert "internal error" not in printed
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ""] == ["net.py"]
