"""TorchScript inside an eager model. ``copy.deepcopy`` of a scripted module keeps a graph to the *original* parameters:
they are no leaves, and a backward of the copy writes into the user's own ``.grad``.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def scripted() -> nn.Module:
    torch.manual_seed(0)
    return torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))


def traced() -> nn.Module:
    torch.manual_seed(0)
    return torch.jit.trace(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), X)


@pytest.mark.parametrize("inner", [scripted, traced])
def test_a_scripted_submodule_passes(inner):
    assert_passes(judge(Net(inner()), X))


def test_a_scripted_submodule_is_left_without_gradients():
    model = Net(scripted())
    judge(model, X)
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


@torch.jit.script
def half(x: Tensor) -> Tensor:
    return x * x.detach()


class CallsAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return half(self.fc(x))


@pytest.mark.xfail(
    strict=True, reason="a detach inside TorchScript is seen by no function mode: never to be called wrong for that"
)
def test_a_detach_inside_a_scripted_function_is_not_called_wrong():
    assert judge(CallsAFunction(), X).verdict != "fail"
