"""Inputs by position, by keyword and both: the trace takes them as the model does, and so does its file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture
from gradctl.forms.torchscript.trace import capture
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

GENERATOR = torch.Generator().manual_seed(0)
X, SCALE, SHIFT = torch.randn(3, 4, generator=GENERATOR), *torch.randn(2, 3, generator=GENERATOR)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)


class Scaled(Net):
    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        y = self.fc(x)
        y = y if shift is None else y + shift
        return y if scale is None else y * scale


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        return self.fc(x) * scale - shift


class Any(Net):
    def forward(self, *xs: Tensor, **others: Tensor) -> Tensor:
        return self.fc(xs[0]) * xs[1] - others["shift"] + 3 * others["scale"]


class Nested(Net):
    def forward(self, x: Tensor, others: dict[str, Tensor]) -> Tensor:
        return self.fc(x) * others["scale"] - others["shift"]


def scaled(x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
    return x[:, :3] * scale - shift


CASES = {
    "the last by keyword": (Scaled(), (X, SHIFT), {"scale": SCALE}),
    "one left out": (Scaled(), (X,), {"scale": SCALE}),
    "all by keyword, in another order": (Scaled(), (), {"scale": SCALE, "shift": SHIFT, "x": X}),
    "keyword-only": (KeywordOnly(), (X,), {"shift": SHIFT, "scale": SCALE}),
    "variadic": (Any(), (X, SCALE), {"shift": SHIFT, "scale": SCALE}),
    "nested": (Nested(), (X,), {"others": {"scale": SCALE, "shift": SHIFT}}),
    "function": (scaled, (X,), {"shift": SHIFT, "scale": SCALE}),
}


def instance(model, args, kwargs) -> Instance:
    return Instance(Subject(target="test", model=model, args=args, kwargs=kwargs))


@pytest.mark.parametrize("name", CASES)
def test_a_trace_and_its_file_take_the_inputs_as_the_model_does(name, tmp_path):
    model, args, kwargs = CASES[name]
    traced = capture(instance(model, args, kwargs))
    torch.jit.save(traced.artifact, str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    assert set(traced.parameters) == {name for name, _ in getattr(model, "named_parameters", list)()}
    for call in (traced.call, loaded):
        torch.testing.assert_close(call(*args, **kwargs), model(*args, **kwargs))


def test_the_copy_has_its_own_forward_again():
    copy = instance(*CASES["keyword-only"])
    capture(copy)
    assert "forward" not in vars(copy.model)
    torch.testing.assert_close(copy.model(X, scale=SCALE, shift=SHIFT), KeywordOnly()(X, scale=SCALE, shift=SHIFT))


class WithMode(Net):
    def forward(self, x: Tensor, mode: str = "double") -> Tensor:
        return self.fc(x) * (2 if mode == "double" else 1)


@pytest.mark.parametrize(("args", "kwargs"), [((X, "double"), {}), ((X,), {"mode": "double"})])
def test_an_input_that_is_no_tensor_is_refused_by_name(args, kwargs):
    with pytest.raises(CannotCapture, match=r"^torch.jit.trace accepts tensors only, and input 'mode' is 'double'\.$"):
        capture(instance(WithMode(), args, kwargs))
    with pytest.raises(RuntimeError):
        torch.jit.trace(WithMode(), (X, "double"))
