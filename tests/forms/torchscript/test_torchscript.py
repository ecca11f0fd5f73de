from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture
from gradctl.forms.torchscript import script, trace
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Unknown(nn.Module):
    """Fails when its methods are compiled, after its class is made."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unknown()


def reason(form, model) -> str:
    with pytest.raises(CannotCapture) as caught:
        form.capture(instance(model))
    return caught.value.reason


def instance(model, *args, **kwargs) -> Instance:
    return Instance(Subject(target="test", model=model, args=args or (X,), kwargs=kwargs))


def test_a_class_that_failed_fails_for_the_same_reason_again():
    torch_alone = []
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            torch.jit.script(Unknown())
        torch_alone.append(str(caught.value))
    assert "Can't redefine method" in torch_alone[1]
    said = "torch.jit.script refuses the model: RuntimeError: 'Tensor' object has no attribute or method 'unknown'"
    assert [reason(script, Unknown()).startswith(said) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(("form", "name"), [(script, "script"), (trace, "trace")])
def test_a_torch_without_torchscript_is_a_reason_not_an_import_error(monkeypatch, form, name):
    monkeypatch.delattr(torch.jit, name)
    assert reason(form, nn.Linear(4, 3)) == f"torch {torch.__version__} has no torch.jit.{name} on this Python."


@pytest.mark.parametrize(("form", "name"), [(script, "script"), (trace, "trace")])
def test_a_torchscript_that_refuses_to_work_is_a_reason(monkeypatch, form, name):
    def refused(*_, **__):
        raise RuntimeError(f"`torch.jit.{name}` is not supported in Python 3.14+.")

    monkeypatch.setattr(torch.jit, name, refused)
    assert reason(form, nn.Linear(4, 3)).endswith(f"RuntimeError: `torch.jit.{name}` is not supported in Python 3.14+")


def test_a_module_whose_forward_is_left_out_is_refused():
    inputs = torch.stack([X, X])
    scripted = torch.jit.script(nn.GRU(4, 3))
    with pytest.raises(AttributeError, match="forward"):
        scripted(inputs)
    with pytest.raises(CannotCapture, match=r"the overloaded forward of GRU; call it from a module of your own\.$"):
        script.capture(instance(nn.GRU(4, 3), inputs))
    wrapped = nn.Sequential(nn.GRU(4, 3))
    torch.testing.assert_close(script.capture(instance(wrapped, inputs)).call(inputs), wrapped(inputs))


@pytest.mark.parametrize("model", [lambda x: x.sin(), torch.autograd.function.NestedIOFunction.apply])
def test_what_has_no_source_is_refused(model):
    assert reason(script, model) == (
        "torch.jit.script compiles source, and a lambda or autograd.Function has none that it reads."
    )
