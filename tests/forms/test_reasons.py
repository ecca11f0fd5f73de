"""What a user reads where a form refuses a model: one sentence, the same from run to run, with their line."""

import dataclasses
import inspect
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradctl.forms.exported import export
from gradctl.forms.form import CannotCapture
from gradctl.forms.reasons import reason_of
from gradctl.forms.table import form_named
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return -self.fc(x)


class SizeOfAValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)[:, : int(x.argmax()) % 3 + 1]


@dataclasses.dataclass
class Pair:
    first: Tensor
    second: Tensor


class DataclassOutput(Net):
    def forward(self, x: Tensor):
        return Pair(self.fc(x), x)


class MixedDictionary(Net):
    def forward(self, x: Tensor):
        return {"value": self.fc(x), "count": 3}


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class OpaqueOutput(Net):
    def forward(self, x: Tensor):
        return Opaque(self.fc(x)), x.sin()


class LambdaAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class PythonRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class Numpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.from_numpy(np.abs(x.detach().numpy())).sum()


class Generating(Net):
    def parts(self, x: Tensor):
        yield self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.parts(x))


class Variadic(Net):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.fc(xs[0])


class Slope(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        return slope


class ScriptedInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x))


class Raising(Net):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise ValueError("not for static forms\nat all")
        return self.fc(x)


class Printing(Net):
    def forward(self, x: Tensor) -> Tensor:
        print("size", x.shape)
        return self.fc(x)


MODELS = (
    Branch,
    SizeOfAValue,
    DataclassOutput,
    MixedDictionary,
    OpaqueOutput,
    LambdaAttribute,
    PythonRandom,
    Numpy,
    Generating,
    Variadic,
    Slope,
    ScriptedInside,
    Raising,
    Printing,
)
UNREADABLE = re.compile(r"\n|0x|__torch__|mangle|Traceback|TORCH_|tensor\(|grad_fn|u0|[:,(]$")


def refusal(form: str, model: object) -> CannotCapture | None:
    """Return how a form refuses a model; None if it takes it."""
    subject = Subject(target="test", model=model, args=(X,))
    try:
        form_named(form).capture(Instance(subject))
    except CannotCapture as refused:
        return refused
    return None


@pytest.mark.parametrize("form", ["trace", "script", "export", "aot"])
@pytest.mark.parametrize("model", MODELS)
def test_a_refusal_is_one_readable_sentence_and_nothing_else_is_printed(form, model, capsys):
    refused = refusal(form, model())
    assert capsys.readouterr() == ("", "")
    if refused is not None:
        assert not UNREADABLE.search(refused.reason), refused.reason
        assert len(refused.reason) < 240


def line_of(model: type[nn.Module], text: str) -> str:
    """Return how a reason names the line of this file that holds ``text``."""
    lines, first = inspect.getsourcelines(model)
    return f"(test_reasons.py, line {first + next(n for n, line in enumerate(lines) if text in line)})"


@pytest.mark.parametrize(("model", "text"), [(Branch, "if x.sum()"), (SizeOfAValue, "argmax")])
def test_a_branch_on_data_is_said_to_be_one_with_its_line(model, text):
    assert refusal("export", model()).reason == (
        "torch.export refuses the model: a branch, a loop or a size depends on the values of a tensor "
        f"{line_of(model, text)}; use torch.where or torch.cond, or a size that does not depend on values"
    )


class FixedSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]) * 4)


class BranchOnASize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[0] > 2 else x.cos()


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1, 4)


class SumOfTwo(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("model", "inputs", "dynamic", "text", "said"),
    [
        (
            FixedSize,
            (X,),
            {"x": {0: "batch"}},
            "int(x.shape",
            "the model fixes the size batch to 3 LINE; use x.shape instead of a number, or omit batch from --dynamic",
        ),
        (
            BranchOnASize,
            (X,),
            {"x": {0: "batch"}},
            "> 2",
            "a branch of the model depends on the size batch LINE; remove the branch, or omit batch from --dynamic",
        ),
        (
            Sum,
            (X[:1],),
            {"x": {0: "batch"}},
            "",
            "the size batch is 1 in the example, which torch.export always treats as a constant; use an example with a "
            "size of 2 or more",
        ),
        (
            SumOfTwo,
            (X, X + 1),
            {"x": {0: "rows"}, "y": {0: "lines"}},
            "",
            "the sizes lines and rows must be equal; use one name for both in --dynamic",
        ),
    ],
)
def test_a_size_that_cannot_be_symbolic_is_said_with_its_line_and_what_to_do(model, inputs, dynamic, text, said):
    instance = Instance(Subject(target="test", model=model(), args=inputs))
    with pytest.raises(CannotCapture) as caught:
        export.capture(instance, dynamic=dynamic)
    expected = said.replace("LINE", line_of(model, text) if text else "")
    assert caught.value.reason == f"torch.export refuses the model: {expected}"


@pytest.mark.parametrize(
    ("form", "model", "said"),
    [
        ("trace", DataclassOutput, "but instead got value of type Pair"),
        (
            "trace",
            MixedDictionary,
            "a dictionary among the inputs or outputs has values of two types, Tensor and int; use tensors only",
        ),
        ("trace", Raising, "ValueError: not for static forms"),
        ("script", LambdaAttribute, "attribute 'act' of LambdaAttribute is a Python function"),
        ("script", Slope, "Expected a value of type 'List[Tensor]' for argument 'outputs'"),
        ("export", Raising, "ValueError: not for static forms"),
        ("export", OpaqueOutput, "which is not a known type"),
    ],
)
def test_the_reason_says_what_it_is_about(form, model, said):
    assert said in refusal(form, model()).reason


def test_what_a_backend_raised_is_the_reason_not_that_it_raised():
    def broken(*_):
        raise ValueError("no such kernel")

    torch._dynamo.reset()
    with pytest.raises(Exception) as caught:
        torch.compile(torch.sin, backend=broken)(X)
    assert reason_of(caught.value) == "ValueError: no such kernel"


def test_a_long_reason_is_cut_after_its_first_sentence_only():
    assert reason_of(ValueError("Too wide. Use 3.")) == "ValueError: Too wide. Use 3"
    assert reason_of(ValueError("Too wide. " + "Use 3. " * 40)) == "ValueError: Too wide"
