"""``detach().requires_grad_()``: a new leaf in the middle of a program, whose inner gradient is used.

Langevin sampling, adversarial examples and deep equilibrium models do it. The value is cut on purpose; the leaf asks
for a gradient all the same, also where the value is held fixed.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.judged import assert_passes, judge

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)


class InnerGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.second(h).tanh().sum(), h, create_graph=True)
        return slope


class InnerBackward(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        z = h.detach().requires_grad_()
        (z**3).sum().backward()
        return (h * z.grad).sum()


class Adversarial(Net):
    def forward(self, x: Tensor) -> Tensor:
        step = torch.zeros_like(x).requires_grad_()
        for _ in range(3):
            (slope,) = torch.autograd.grad(self.second(x + step).tanh().sum(), step)
            step = (step + 0.1 * slope.sign()).clamp(-0.2, 0.2).detach().requires_grad_()
        return self.second(x + step).tanh()


class Langevin(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            z = z.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.second(z + x).tanh().pow(2).sum(), z)
            z = z - 0.1 * slope + 0.01 * torch.randn_like(z)
        return self.second(z.detach() + x).tanh()


class ByAttribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).detach()
        h.requires_grad = True
        (slope,) = torch.autograd.grad(self.second(h).tanh().sum(), h, create_graph=True)
        return slope


class Cloned(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.second(h).tanh().sum(), h, create_graph=True)
        return slope


class InnerOptimiser(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(5, 4, requires_grad=True)
        optimiser = torch.optim.SGD([z], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            ((self.second(z) - self.second(x).detach()) ** 2).sum().backward()
            optimiser.step()
        self.zero_grad()
        return self.second(z.detach() + x).tanh()


@pytest.mark.parametrize("net", [InnerGradient, InnerBackward, Adversarial, Langevin])
def test_a_detached_leaf_asks_for_a_gradient_beside_the_point_too(net):
    assert_passes(judge(net(), X))


@pytest.mark.parametrize("net", [ByAttribute, Cloned, InnerOptimiser])
def test_other_ways_to_restart_a_gradient_pass(net):
    assert_passes(judge(net(), X))
