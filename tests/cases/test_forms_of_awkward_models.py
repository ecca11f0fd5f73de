"""What each form does with awkward models: a table, a model a row, a form a column, as torch 2.13 behaves on CPU.

``pass``; ``fail``, where the form computes something else; ``refuses``, where it does not take the model and says why.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.compared import causes, compared, comparing, different

FORMS = ("trace", "script", "export", "aot")
GENERATOR = torch.Generator().manual_seed(1)
X, SCALE = torch.randn(3, 4, generator=GENERATOR), torch.randn(3, generator=GENERATOR)
COMPLEX = torch.randn(3, 4, dtype=torch.complex64, generator=GENERATOR)
IDS = torch.tensor([[1, 4, 2], [0, 3, 3]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)


class DictOfTensorAndTuple(Net):
    def forward(self, x: Tensor):
        h = self.fc(x)
        return {"a": h, "b": (h * 2, h.sum())}


@dataclass
class Pair:
    first: Tensor
    second: Tensor


class DataclassOutput(Net):
    def forward(self, x: Tensor):
        return Pair(self.fc(x), x.sum())


class NoneInOutput(Net):
    def forward(self, x: Tensor):
        return self.fc(x), None


class IntegerInOutput(Net):
    def forward(self, x: Tensor):
        return self.fc(x), 3


class Counter(Net):
    """Counts its calls, and multiplies with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.fc(x) * self.n


class UnusedCounter(Counter):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.fc(x)


class RunningMean(Net):
    """Updates a buffer under ``no_grad`` and uses it: trace drops the ``no_grad``, and the second backward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * h.mean(0))
        return h - self.mean


class PythonState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class LazyCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.full((3,), 2.0)
        return self.fc(x) * self.cache


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


class ComplexScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).abs()


class BooleanAndIndexOutputs(Net):
    def forward(self, x: Tensor):
        h = self.fc(x)
        return h, h > 0, h.argmax(1)


class Aliases(Net):
    def forward(self, x: Tensor):
        h = self.fc(x)
        return h, h, h[0], h.view(-1)


class InputAsOutput(Net):
    def forward(self, x: Tensor):
        return self.fc(x), x


class InputMutated(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.fc(x)


class IntegerInputMutated(Net):
    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        steps.add_(1)
        return self.fc(x) * steps


class UnusedParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class NaNInSomeOutputs(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).sub(-0.5).sqrt()


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.fc(y).tanh(), x, use_reentrant=False)


class ConstantInForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.tensor([0.1, 0.2, 0.3])


class NonPersistentBuffer(Net):
    """And a tensor kept as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("two", torch.full((3,), 2.0), persistent=False)
        self.three = torch.full((3,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.two + self.three


class DataDependentIf(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x) * 2
        return self.fc(x) * 3


class SumOfItem(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * x.sum().item()


class PythonRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class Forces(nn.Module):
    """``autograd.grad`` inside forward."""

    def forward(self, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        return slope


class ErfAndCumsum(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.fc(x)).cumsum(1)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return built


SAME = "pass pass pass pass"
Row = tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], str]

# name: model, positional inputs, keyword inputs, and what trace, script, export and aot make of it
TABLE: dict[str, Row] = {
    "dict with tensor and tuple": (DictOfTensorAndTuple, (X,), {}, "refuses pass pass pass"),
    "dataclass output": (DataclassOutput, (X,), {}, "refuses refuses refuses pass"),
    "None in the output": (NoneInOutput, (X,), {}, "refuses pass pass pass"),
    "Python int in the output": (IntegerInOutput, (X,), {}, "refuses pass pass pass"),
    # export copies the counter after the graph has saved it, and aot computes the count again in the backward
    "buffer counter in the value": (Counter, (X,), {}, "pass pass fail fail"),
    "buffer counter": (UnusedCounter, (X,), {}, SAME),
    "running mean under no_grad": (RunningMean, (X,), {}, "fail pass pass pass"),
    "BatchNorm in training mode": (
        seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()),
        (X,),
        {},
        SAME,
    ),
    # TorchScript's autodiff, which starts at the second call, has abs as real numbers have it, with sign
    "complex input": (ComplexScale, (COMPLEX,), {}, "fail fail pass pass"),
    "bfloat16": (lambda: mlp().bfloat16(), (X.bfloat16(),), {}, SAME),
    "float16": (lambda: mlp().half(), (X.half(),), {}, SAME),
    "float64 erf and cumsum": (lambda: ErfAndCumsum().double(), (X.double(),), {}, SAME),
    "data-dependent if": (DataDependentIf, (X,), {}, "fail pass refuses pass"),
    "item": (SumOfItem, (X,), {}, "fail pass pass pass"),
    "Python's random numbers": (PythonRandom, (X,), {}, "fail refuses fail pass"),
    "lazy cache": (LazyCache, (X,), {}, "pass refuses pass pass"),
    "keyword-only input": (KeywordOnly, (X,), {"scale": SCALE}, SAME),
    "all inputs by keyword": (Scaled, (), {"x": X, "scale": SCALE}, SAME),
    "unused parameter": (UnusedParameter, (X,), {}, SAME),
    "frozen parameter": (Frozen, (X,), {}, SAME),
    "bool and int outputs": (BooleanAndIndexOutputs, (X,), {}, SAME),
    "aliases": (Aliases, (X,), {}, SAME),
    "input as output": (InputAsOutput, (X,), {}, SAME),
    "input mutated": (InputMutated, (X,), {}, SAME),
    "integer input mutated": (IntegerInputMutated, (X, torch.tensor([1, 2, 3])), {}, SAME),
    "empty batch": (seeded(lambda: nn.Linear(4, 3)), (torch.zeros(0, 4),), {}, SAME),
    "non-contiguous input": (seeded(lambda: nn.Linear(3, 4)), (X.t(),), {}, SAME),
    "NaN in the output": (NaNInSomeOutputs, (X,), {}, SAME),
    "checkpoint": (Checkpointed, (X,), {}, "pass refuses pass pass"),
    "constant in forward": (ConstantInForward, (X,), {}, SAME),
    "non-persistent buffer": (NonPersistentBuffer, (X,), {}, SAME),
    "autograd.grad in forward": (Forces, (X,), {}, "pass refuses pass refuses"),
    # torch scripts both: one script has no forward to call, and the other's only raises
    "GRU": (seeded(lambda: nn.GRU(4, 3)), (torch.stack([X, X + 1]),), {}, "pass refuses pass refuses"),
    "weight_norm": (
        seeded(lambda: parametrizations.weight_norm(nn.Linear(4, 3))),
        (X,),
        {},
        "pass fail pass pass",
    ),
    "embedding": (seeded(lambda: nn.Embedding(6, 4, padding_idx=0)), (IDS,), {}, SAME),
}


def measured(build: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    eager = comparing(build(), *args, kwargs=kwargs)
    units = [eager.form(form, named=False) for form in FORMS]
    assert all(unit.reason for unit in units if unit.status == "unsupported")
    return " ".join("refuses" if unit.status == "unsupported" else unit.verdict for unit in units)


# The causes of the failures of the table; where torch itself is mistaken, none.
CAUSES: dict[tuple[str, str], str | None] = {
    ("buffer counter in the value", "export"): None,
    ("buffer counter in the value", "aot"): None,
    ("running mean under no_grad", "trace"): "GC201",
    ("complex input", "trace"): None,
    ("complex input", "script"): None,
    ("data-dependent if", "trace"): "GC205",
    ("item", "trace"): "GC207",
    ("Python's random numbers", "trace"): "GC210",
    ("Python's random numbers", "export"): "GC210",
    ("weight_norm", "script"): None,
}


@pytest.mark.parametrize(("name", "form"), CAUSES)
def test_each_failure_states_its_cause(name, form):
    build, args, kwargs, _ = TABLE[name]
    assert causes(compared(form, build(), *args, kwargs=kwargs)) == {CAUSES[name, form]}


def test_each_failure_of_the_table_is_among_those_with_a_cause():
    rows = (
        (name, form, verdict)
        for name, row in TABLE.items()
        for form, verdict in zip(FORMS, row[3].split(), strict=True)
    )
    assert {(name, form) for name, form, verdict in rows if verdict == "fail"} == set(CAUSES)


@pytest.mark.parametrize("name", TABLE)
def test_each_form_does_with_it_what_the_table_says(name):
    build, args, kwargs, expected = TABLE[name]
    assert measured(build, args, kwargs) == expected


def test_the_counter_that_export_fails_on_raises_in_plain_torch():
    module = torch.export.export(Counter(), (X,)).module()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(X).sum().backward()
    unit = compared("export", Counter(), X)
    assert (different(unit), causes(unit)) == ({"": "GC303"}, {None})


def test_the_running_mean_that_trace_fails_on_raises_in_plain_torch():
    traced = torch.jit.trace(RunningMean(), (X,), check_trace=False)
    traced(X).sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        traced(X).sum().backward()
    unit = compared("trace", RunningMean(), X)
    assert (different(unit), causes(unit)) == ({"": "GC303"}, {"GC201"})


class ReassignedBuffer(Net):
    """A running mean that is assigned, not written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


@pytest.mark.parametrize("form", ["script", "export", "aot"])
def test_plain_torch_is_right_about_a_buffer_that_is_assigned(form):
    torch._dynamo.reset()
    eager, model = ReassignedBuffer(), ReassignedBuffer()
    static = {
        "script": lambda: torch.jit.script(model),
        "export": lambda: torch.export.export(model, (X,)).module(),
        "aot": lambda: torch.compile(model, backend="aot_eager"),
    }[form]()
    for _ in range(3):
        torch.testing.assert_close(static(X), eager(X))
    torch.testing.assert_close(static.mean, eager.mean)


@pytest.mark.parametrize("form", ["script", "export", "aot"])
def test_a_buffer_that_is_assigned_is_the_same(form):
    unit = compared(form, ReassignedBuffer(), X)
    assert (unit.verdict, [each.message for each in unit.findings]) == ("pass", [])


def test_a_python_counter_is_the_same_in_aot():
    assert compared("aot", PythonState(), X).verdict == "pass"


@pytest.mark.parametrize("form", ["trace", "export"])
def test_a_python_counter_is_baked_in_and_found_at_the_second_call(form):
    unit = compared(form, PythonState(), X)
    assert unit.verdict == "fail"
    assert all("at call 2" in each.message or "at call 3" in each.message for each in unit.findings)
    assert causes(unit) == {"GC207"}


def test_trace_takes_inputs_by_position_and_by_keyword():
    assert compared("trace", Scaled(), X, kwargs={"scale": SCALE}).verdict == "pass"
