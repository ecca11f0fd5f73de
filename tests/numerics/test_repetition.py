"""The tolerance for two runs of one function: relative to the norm, and to the noise of one ULP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradctl.numerics.repetition import is_cancelled, noise_of, repetition_tolerance
from gradctl.subject.instance import Instance
from gradctl.subject.loading.load import make_subject

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, 1e-12), (torch.complex128, 1e-12), (torch.float32, 8 * 2**-23), (torch.bfloat16, 8 * 2**-7)],
)
def test_tolerance_is_relative_to_the_norm_in_each_dtype(dtype: torch.dtype, expected: float) -> None:
    assert repetition_tolerance(3.0, 0.0, dtype) == pytest.approx(3 * expected)


def test_tolerance_of_a_cancelled_tensor_is_its_noise() -> None:
    assert repetition_tolerance(1e-19, 1e-19, torch.float64) == pytest.approx(1e-18)
    assert is_cancelled(1e-19, 1e-19, torch.float64)
    assert not is_cancelled(1.0, 1e-15, torch.float64)
    assert not is_cancelled(0.0, 0.0, torch.float64)


def test_noise_is_the_largest_change() -> None:
    value = torch.zeros(4)
    assert noise_of(value, [torch.full((4,), 0.5), torch.full((4,), -2.0), None, torch.zeros(3)]) == 4.0


@pytest.mark.parametrize("is_promoted", [False, True])
def test_weights_buffers_and_inputs_move_by_one_ulp_and_stay_there(is_promoted: bool) -> None:
    model = nn.BatchNorm1d(3).eval()
    model.weight.requires_grad_(False)
    subject = make_subject(model, torch.ones(2, 3), kwargs=None, loss=None, seed=0)
    instance = Instance(subject, promoted=is_promoted)
    instance.move_by_ulp(1)
    instance.restore()
    (x,), _ = instance.inputs()
    dtype = torch.float64 if is_promoted else torch.float32
    for tensor in (x, instance.model.weight, instance.model.running_var):
        change = (tensor.detach() - 1).abs()
        assert tensor.dtype == dtype
        assert ((change > 0) & (change <= torch.finfo(dtype).eps)).all()
    assert torch.equal(model.weight, torch.ones(3))
