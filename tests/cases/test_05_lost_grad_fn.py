"""Case 5 (pytorch 194479): two views of a value and its detached self as outputs: under inductor none has a grad_fn.

GC403, as eager has a gradient and the compiled model has none. Twin: without the detached output.
"""

import pytest
import torch
from torch import Tensor

from tests.compared import causes, compared, different

X = torch.randn(8, generator=torch.Generator().manual_seed(1))


def with_detached(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    return y[:4], y[4:], y.detach()


def without_detached(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    return y[:4], y[4:]


@pytest.mark.slow
def test_inductor_is_missing_the_gradient_where_torch_loses_it():
    torch._dynamo.reset()
    outputs = torch.compile(with_detached)(X.clone().requires_grad_())
    lost = all(each.grad_fn is None for each in outputs)  # they ask for a gradient, and are leaves
    assert lost or torch.__version__ >= "2.14", "expected on torch 2.13"
    unit = compared("compile", with_detached, X)
    assert different(unit) == ({"input:x": "GC403"} if lost else {})
    assert causes(unit) == (
        {None} if lost else set()
    )  # a mistake of the compiler: nothing that eager can be made to do


@pytest.mark.slow
def test_without_the_detached_output_inductor_is_right():
    assert compared("compile", without_detached, X).verdict == "pass"


@pytest.mark.parametrize("form", ["trace", "export", "aot"])
def test_the_other_forms_keep_the_gradient(form):
    assert compared(form, with_detached, X).verdict == "pass"
