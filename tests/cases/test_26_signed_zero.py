"""Cases 26 and 27 (pytorch 183606 and its family): inductor folds ``x * 0`` with signs, and NaN, lost.

``1 / (x * 0)`` at -1 is -inf in eager and +inf in inductor; sqrt(0) * 0 has a NaN gradient in eager and 0 in inductor.
Nobody can judge at such a point: ``differs``. The other forms run eager's own kernels. Twin: away from the zero.
"""

import pytest
import torch
from torch import Tensor

from tests.compared import causes, compared, verdicts

FORMS = ("trace", "export", "aot")


def signed_zero(x: Tensor) -> Tensor:
    return (1 / (x * 0)).clamp(-2, 2) + x


def no_zero(x: Tensor) -> Tensor:
    return (1 / (x * 0.5)).clamp(-2, 2) + x


def root_of_zero(x: Tensor) -> Tensor:
    return ((x * 0).sqrt() * 0).sum() + x


X = torch.tensor([-1.0, 2.0])


@pytest.mark.parametrize("function", [signed_zero, root_of_zero])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_run_eagers_kernels_agree_with_eager(form, function):
    assert compared(form, function, X).verdict == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("function", [signed_zero, root_of_zero])
def test_inductor_differs_where_its_values_do(function):
    torch._dynamo.reset()
    eager, compiled = X.clone().requires_grad_(), X.clone().requires_grad_()
    outputs = function(eager), torch.compile(function)(compiled)
    for output in outputs:
        output.sum().backward()
    same = all(torch.allclose(*pair, equal_nan=True) for pair in (outputs, (eager.grad, compiled.grad)))
    unit = compared("compile", function, X)
    assert unit.verdict == ("pass" if same else "fail")
    assert set(verdicts(unit).values()) <= {"same", "differs"}
    assert causes(unit) <= {None}  # inductor folds a product: no cause of the program's


@pytest.mark.slow
def test_away_from_the_zero_inductor_is_right():
    assert compared("compile", no_zero, X).verdict == "pass"
