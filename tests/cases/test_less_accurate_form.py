"""A form that only rounds worse than eager is a warning; one that is wrong in float32 alone is an error.

Compilers choose kernels and layouts that sum in another order: the error of their float32 results averages out over
inputs and is not there in float64. A kernel that is wrong in float32 alone is not there in float64 either, and its
error does not average out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.compared import compared, different

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
FORMS = ("trace", "export", "aot")


def captured_in_float32(value: Tensor) -> bool:
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and value.dtype == torch.float32


class Net(nn.Module):
    """Two layers; a form of it in float32 computes ``kernel`` between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2((self.kernel(h) if captured_in_float32(h) else h).tanh())

    def kernel(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class RoundedWorse(Net):
    def kernel(self, h: Tensor) -> Tensor:
        return h.half().float()


class TooLarge(Net):
    def kernel(self, h: Tensor) -> Tensor:
        return h * 1.0003


class OneColumnTooLarge(Net):
    def kernel(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, :1] * 1.0003, h[:, 1:]], dim=1)


class Overflowing(Net):
    def kernel(self, h: Tensor) -> Tensor:
        return h * torch.where(h.detach().abs() > 1.5, 1e38 * 1e38 * torch.ones(()), 1.0)


class GradientTooLarge(Net):
    def kernel(self, h: Tensor) -> Tensor:
        return 1.0003 * h - (0.0003 * h).detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_rounds_worse_is_a_warning(form):
    unit = compared(form, RoundedWorse(), X)
    assert unit.verdict == "pass"
    assert {each.code for each in unit.findings if each.severity == "warning"} == {"GC305"}
    assert {each.verdict for each in unit.tensors} == {"less-accurate", "same"}
    assert "is less accurate in" in unit.findings[0].message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [TooLarge, OneColumnTooLarge])
def test_a_kernel_that_is_wrong_in_float32_alone_is_an_error(form, model):
    unit = compared(form, model(), X)
    assert unit.verdict == "fail"
    assert different(unit)["output"] == "GC301"
    assert different(unit)["input:x"] == "GC402"


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_that_overflows_in_float32_alone_is_an_error(form):
    unit = compared(form, Overflowing(), X)
    assert unit.verdict == "fail"
    assert "GC305" not in {each.code for each in unit.findings}


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_that_is_wrong_in_float32_alone_is_an_error(form):
    assert different(compared(form, GradientTooLarge(), X)) == dict.fromkeys(
        ["input:x", "param:fc1.weight", "param:fc1.bias"], "GC402"
    )
