"""The logarithm of the gamma function and its derivatives, against closed forms and torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.gamma import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch

lgamma, digamma, polygamma = (
    TABLE[getattr(torch.ops.aten, name).default] for name in ("lgamma", "digamma", "polygamma")
)
LINE = torch.cat(
    [torch.linspace(-6.3, 12, 200), torch.tensor([1e-10, 1e-3, 1, 2, 8.999, 9, 9.001, 30, 1e3, 1e8, 1e20, -20.3])]
).double()


def test_log_gamma_is_that_of_torch():
    at = torch.cat(
        [LINE, torch.tensor([0.0, -1.0, -7.0, 1e300, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)]
    )
    torch.testing.assert_close(lgamma(at), torch.lgamma(at), rtol=1e-13, atol=1e-14, equal_nan=True)
    whole = torch.arange(1, 20, dtype=torch.float64)
    factorials = torch.tensor([math.lgamma(each) for each in whole.tolist()], dtype=torch.float64)
    torch.testing.assert_close(lgamma(whole), factorials, rtol=1e-14, atol=1e-14)


def test_digamma_is_that_of_torch():
    at = torch.cat([LINE, torch.tensor([0.0, -1.0, -7.0, torch.inf, torch.nan], dtype=torch.float64)])
    torch.testing.assert_close(digamma(at), torch.digamma(at), rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_derivatives_of_digamma_are_those_of_torch(order):
    at = LINE[LINE > 0] if order > 1 else LINE
    # torch's own of order 1 is off by 5e-10 (2.13).
    torch.testing.assert_close(
        polygamma(order, at), torch.polygamma(order, at), rtol=1e-9 if order == 1 else 1e-12, atol=0
    )


def test_the_first_derivative_has_its_closed_forms():
    """DLMF 5.4.13 and the sum over 1 / k^2."""
    at, squared = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), math.pi**2
    wanted = torch.tensor([squared / 6, squared / 2, squared / 6 - 1], dtype=torch.float64)
    torch.testing.assert_close(polygamma(1, at), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_below_zero_they_obey_the_recurrence(order):
    """DLMF 5.15.5, from which torch strays (2.13: polygamma is taken there by what holds above 0 alone)."""
    at = torch.linspace(-6.35, -0.15, 63, dtype=torch.float64)
    step = (-1) ** order * math.factorial(order) * at ** (-order - 1)
    torch.testing.assert_close(polygamma(order, at + 1), polygamma(order, at) + step, rtol=1e-10, atol=1e-10)


def test_order_zero_integers_and_float32():
    torch.testing.assert_close(polygamma(0, LINE), digamma(LINE))
    for function, torchs in ((lgamma, torch.lgamma), (digamma, torch.digamma)):
        torch.testing.assert_close(function(torch.arange(1, 5)), torchs(torch.arange(1, 5)))
        assert function(torch.ones(2)).dtype == torch.float32


def test_the_gradients_are_those_of_torch():
    at = LINE[(LINE > 0.01) & (LINE < 1e6)]
    assert_as_torch(TABLE, {"lgamma", "digamma"}, torch.lgamma, at)
    assert_as_torch(TABLE, {"polygamma"}, lambda x: torch.polygamma(2, x), at)


def test_likelihoods_are_right_in_onnxruntime():
    def likelihoods(x: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape, rate = x.exp(), rate.exp()
        gamma = torch.distributions.Gamma(shape, rate, validate_args=False)
        counts = torch.distributions.NegativeBinomial(shape, logits=rate, validate_args=False)
        return gamma.log_prob(x.abs() + 1), counts.log_prob(torch.ones(3, 4)), gamma.entropy()

    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(3, 4, generator=generator) for _ in range(2))
    unit = Comparing(Subject(target="likelihoods", model=likelihoods, args=inputs), Allows(())).form(
        "onnx-joint", named=True
    )
    assert (unit.verdict, unit.reason) == ("pass", None), (unit.details, unit.findings)
