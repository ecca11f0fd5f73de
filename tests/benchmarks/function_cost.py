"""What checking custom Functions adds to `gradctl gradcheck`, for models with 1, 20 and 200 calls of them, in one run.

    python tests/benchmarks/function_cost.py [--repeats 3]

"without" is the same check with custom Functions taken as torch calls are: judged through the model's gradients alone.
"one shape" calls the Function on tensors of one shape, so that three calls of all are looked at; "each its own" gives
each call a shape of its own. "on alarm" is the same model with one of its calls wrong, the last. Seconds are the best
of the repeats.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.autograd import Function

from gradctl.gradients import gradcheck
from gradctl.subject.subject import Subject

WIDTH = 128


class Tanh(Function):
    @staticmethod
    def forward(ctx, x, factor):
        y = x.tanh()
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return ctx.factor * gradient * (1 - y * y), None


class Deep(nn.Module):
    """Linear layers with a Function after each; 20 layers at most, used again and again."""

    def __init__(self, calls: int, *, one_shape: bool, wrong: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(min(calls, 20)))
        self.calls, self.one_shape, self.wrong = calls, one_shape, wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(self.calls):
            h = self.layers[number % len(self.layers)](x)
            rows = len(h) if self.one_shape else 1 + number % len(h)
            factor = 1.01 if self.wrong and number == self.calls - 1 else 1.0
            x = torch.cat([Tanh.apply(h[:rows], factor), h[rows:].tanh()]) + 0.1 * x
        return x


def seconds(calls: int, *, one_shape: bool, wrong: bool = False, checked: bool = True) -> float:
    """Return the time of one check; with ``checked`` false the custom Functions are not looked at."""
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1))
    subject = Subject(target="deep", model=Deep(calls, one_shape=one_shape, wrong=wrong), args=(x,))
    own = gradcheck.is_users
    gradcheck.is_users = own if checked else lambda function: False
    start = time.perf_counter()
    try:
        unit = gradcheck.gradcheck(subject)
    finally:
        gradcheck.is_users = own
    assert unit.verdict == ("fail" if wrong else "pass"), unit.findings
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds(1, one_shape=True)  # what torch imports on first use
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch 256, width {WIDTH}")
    print(f"{'calls':>5} {'shapes':<12} {'without':>9} {'with':>9} {'added':>7} {'on alarm':>9} {'ratio':>6}")
    for calls in (1, 20, 200):
        for one_shape in (True, False) if calls > 1 else (True,):
            without, checked, alarmed = (
                min(seconds(calls, one_shape=one_shape, wrong=wrong, checked=check) for _ in range(options.repeats))
                for wrong, check in ((False, False), (False, True), (True, True))
            )
            print(
                f"{calls:>5} {'one shape' if one_shape else 'each its own':<12} {without:>7.2f} s {checked:>7.2f} s "
                f"{checked / without - 1:>+7.0%} {alarmed:>7.2f} s {alarmed / checked:>5.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
