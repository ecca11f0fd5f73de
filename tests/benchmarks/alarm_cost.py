"""What an alarm costs: seconds of a check that passes, and of one that explains a wrong gradient, side by side.

    python tests/benchmarks/alarm_cost.py [NAME …]

An alarmed check may take ten times a silent one. The last row has no wrong twin: an integrator of 100 steps, each with
gradients inside, is long without an alarm.
"""

from __future__ import annotations

import copy
import math
import sys
import time

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.subject import Subject


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Sine(Function):
    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class WrongSine(Sine):
    @staticmethod
    def backward(ctx, gradient):
        return 1.1 * gradient * ctx.saved_tensors[0].cos()


class EighteenCalls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layers, self.function = nn.ModuleList(nn.Linear(16, 16) for _ in range(18)), function

    def forward(self, x):
        for layer in self.layers:
            x = self.function.apply(layer(x))
        return x


class Heads(nn.Module):
    """Attention, head by head."""

    def __init__(self, heads=16, width=64):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.size = heads, width // heads

    def forward(self, x):
        q, k, v = (layer(x).split(self.size, -1) for layer in (self.q, self.k, self.v))
        found = [(q[i] @ k[i].transpose(-1, -2) / math.sqrt(self.size)).softmax(-1) @ v[i] for i in range(self.heads)]
        return self.out(torch.cat(found, -1))


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(8, 16, num_layers=2, bidirectional=True), nn.Linear(32, 6)

    def forward(self, x):
        scores = self.out(self.gru(x)[0]).log_softmax(-1)
        targets = torch.arange(20).reshape(4, 5) % 5 + 1
        return nn.functional.ctc_loss(scores, targets, torch.full((4,), len(x)), torch.full((4,), 5))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1000, 1000), nn.Linear(1000, 10)

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Scattered(nn.Module):
    """Scatters the rows of its input; torch's gradient is wrong if an index occurs twice."""

    def __init__(self, inner, twice):
        super().__init__()
        self.inner, self.twice = inner, twice

    def forward(self, x):
        index = torch.arange(len(x))
        index[-1] -= int(self.twice)
        index = index.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
        return self.inner(torch.zeros_like(x).scatter(0, index, x.sin()))


class OneElement(Function):
    """The identity of a matrix, wrong in the gradient of one element."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[3, 5] *= 2
        return gradient


class WideWithOneWrong(Wide):
    def forward(self, x):
        weight = OneElement.apply(self.first.weight)
        return self.last(nn.functional.linear(x, weight, self.first.bias).tanh())


class Flow(nn.Module):
    """A continuous normalising flow: 100 steps of Runge and Kutta, the divergence by gradients inside."""

    def __init__(self, steps=100):
        super().__init__()
        self.field, self.steps = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)), steps

    def slope(self, t, x):
        x = x if x.requires_grad else x.requires_grad_()
        y = self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))
        divergence = sum(torch.autograd.grad(y[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return y, -divergence

    def forward(self, x):
        change, step = x.new_zeros(len(x)), 1 / self.steps
        for i in range(self.steps):
            t = i * step
            k1, d1 = self.slope(t, x)
            k2, d2 = self.slope(t + step / 2, x + step / 2 * k1)
            k3, d3 = self.slope(t + step / 2, x + step / 2 * k2)
            k4, d4 = self.slope(t + step, x + step * k3)
            x, change = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), change + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return change - x.square().sum(-1) / 2


def scattered(inner):
    return Scattered(inner, twice=False), Scattered(copy.deepcopy(inner), twice=True)


CASES = {
    "a Function in 18 calls": lambda: (EighteenCalls(Sine), EighteenCalls(WrongSine), gaussian(8, 16)),
    "16 heads of attention": lambda: (*scattered(Heads()), gaussian(4, 12, 64)),
    "a GRU with ctc_loss": lambda: (*scattered(Speech()), gaussian(30, 4, 8)),
    "one element of 1e6": lambda: (Wide(), WideWithOneWrong(), gaussian(8, 1000)),
    "a continuous flow": lambda: (Flow(), None, gaussian(8, 2)),
}


def seconds(model, x) -> tuple[float, int]:
    start = time.perf_counter()
    unit = gradcheck(Subject(target="benchmark", model=model, args=(x,), kwargs={}))
    return time.perf_counter() - start, unit.oracle.forwards


def main() -> None:
    print(f"{'':24} {'silent':>8} {'forwards':>9} {'alarmed':>8} {'forwards':>9} {'times':>6}")
    for name, make in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        right, wrong, x = make()
        silent, forwards = seconds(right, x)
        row = f"{name:24} {silent:8.1f} {forwards:9}"
        if wrong is not None:
            alarmed, more = seconds(wrong, x)
            row += f" {alarmed:8.1f} {more:9} {alarmed / silent:6.1f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
