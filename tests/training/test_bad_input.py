"""What cannot be trained is one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.errors import TargetError
from gradctl.subject.subject import Subject


def compared(*, model=None, loss=None, **options):
    subject = Subject(target="test", model=model or nn.Linear(4, 3), args=(torch.ones(2, 4),), loss=loss)
    return compare_steps(subject, 1, **{"variants": ["foreach"], **options})


def raising(parameters):
    raise ValueError("no parameters for me")


class Raising(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": lambda outputs: outputs.square()}, "GC113 the loss returns a tensor of shape [2, 3], not a scalar"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "GC143 test has no parameter that requires a gradient"),
        ({"optimizer": raising}, "GC144 the optimizer raising raises ValueError: no parameters for me. It is"),
        ({"optimizer": lambda parameters: 3}, "GC144 the optimizer <lambda> returns 'int'. Return a torch.optim."),
        ({"optimizer": Raising}, "GC144 the optimizer Raising raises in step(): RuntimeError: not today."),
        ({"optimizer": torch.optim.LBFGS}, "GC144 the optimizer LBFGS raises in step(): TypeError: "),
        ({"variants": [lambda model, optimizer, x: "loss"]}, "GC145 the step returns 'str'. Return the loss, a scalar"),
        ({"variants": [nn.Linear]}, "GC145 the variant Linear is a class. Give a function step(model, optimizer, "),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(options, said):
    with pytest.raises(TargetError) as caught:
        compared(**options)
    assert str(caught.value).startswith(said)


def test_a_step_of_a_closure_is_not_supported():
    with pytest.raises(TargetError, match="A step that takes a closure is not supported"):
        compared(optimizer=torch.optim.LBFGS)


def test_a_loss_that_is_not_finite_is_inconclusive():
    (unit,) = compared(loss=lambda outputs: outputs.mean() / 0)
    assert (unit.verdict, unit.reason) == ("inconclusive", "the loss of the first step is not finite")
