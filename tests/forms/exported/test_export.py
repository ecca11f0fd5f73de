from __future__ import annotations

import torch
from torch import Tensor, nn

from gradctl.forms.exported.export import capture
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.tracing.promotion import Promotion

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() * 2, lambda y: y.cos() * 3, (x,))


def run_wide(subject: Subject) -> None:
    """Run eager in float64: torch.cond compiles what it runs, under the mode that promotes."""
    wide = Instance(subject, promoted=True)
    with Promotion(torch.float32):
        wide.run()


def test_a_conditional_is_exported_after_eager_ran_in_float64():
    subject = Subject(target="test", model=Conditional(), args=(X,))
    torch.compiler.reset()
    run_wide(subject)
    exported = capture(Instance(subject))
    for x in (X, -X):
        torch.testing.assert_close(exported.call(x), x.sin() * 2 if x.sum() > 0 else x.cos() * 3)


def test_one_tensor_given_twice_is_two_inputs():
    def difference(a: Tensor, b: Tensor) -> Tensor:
        return a - b

    exported = capture(Instance(Subject(target="test", model=difference, args=(X, X))))
    torch.testing.assert_close(exported.call(X, 2 * X), -X)
