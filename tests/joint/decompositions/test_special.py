"""Special functions, against closed forms and torch's own kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, assert_right_in_onnxruntime, values

aten = torch.ops.aten


LINE = torch.cat(
    [
        torch.linspace(-26, 30, 500, dtype=torch.float64),
        torch.tensor([0.0, 1e-12, -1e-12, 1e-300, 1e8, -0.999, -1.0, torch.inf, torch.nan], dtype=torch.float64),
    ]
)


@pytest.mark.parametrize(
    ("name", "at"),
    [("special_erfcx", LINE), ("special_log_ndtr", 3 * LINE), ("log1p", LINE), ("expm1", LINE), ("expm1", -LINE)],
)
def test_small_and_large_arguments_keep_their_digits(name, at):
    operator = getattr(aten, name).default
    # A power of e to the hundreds has some hundred times the rounding of its argument.
    torch.testing.assert_close(TABLE[operator](at), operator(at), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("erfinv", torch.linspace(-1, 1, 401, dtype=torch.float64)),
        ("erfinv", torch.tensor([1e-300, 1 - 1e-12, -1 + 1e-16, torch.nan, 1.5, -2.0], dtype=torch.float64)),
        ("special_ndtri", torch.linspace(0, 1, 401, dtype=torch.float64)),
        ("special_ndtri", torch.tensor([1e-300, 1e-13, 1e-7, torch.nan, 1.5, -1.0], dtype=torch.float64)),
    ],
)
def test_quantiles_keep_their_digits(name, at):
    operator = getattr(aten, name).default
    # torch's own erfinv is off by 1e-12 where 1 - x is.
    torch.testing.assert_close(TABLE[operator](at), operator(at), rtol=1e-11, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("name", ["special_erfcx", "special_log_ndtr", "log1p", "expm1", "erfinv", "special_ndtri"])
def test_integers_become_floats(name):
    operator = getattr(aten, name).default
    torch.testing.assert_close(
        TABLE[operator](torch.tensor([0, 1, 5])), operator(torch.tensor([0, 1, 5])), equal_nan=True
    )


def test_the_functions_are_right_in_onnxruntime():
    def functions(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        special = (
            torch.special.erfcx(x),
            torch.special.log_ndtr(x * 8),
            torch.log1p(x.abs() * 1e-6),
            torch.expm1(x / 1e5),
            torch.erfinv(x.tanh()),
            torch.special.ndtri(x.sigmoid()),
            torch.hypot(x, x.flip(1)),
            torch.copysign(x, -x),
        )
        return *special, torch.linalg.vector_norm(x, keepdim=True), F.softshrink(x), x.sum().logsumexp(0), x.prod(1)

    assert_right_in_onnxruntime(functions, values(4, 5).float())


lgamma, digamma, polygamma = (
    TABLE[getattr(torch.ops.aten, name).default] for name in ("lgamma", "digamma", "polygamma")
)


GAMMA_LINE = torch.cat(
    [torch.linspace(-6.3, 12, 200), torch.tensor([1e-10, 1e-3, 1, 2, 8.999, 9, 9.001, 30, 1e3, 1e8, 1e20, -20.3])]
).double()


def test_log_gamma_is_that_of_torch():
    at = torch.cat(
        [GAMMA_LINE, torch.tensor([0.0, -1.0, -7.0, 1e300, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)]
    )
    torch.testing.assert_close(lgamma(at), torch.lgamma(at), rtol=1e-13, atol=1e-14, equal_nan=True)
    whole = torch.arange(1, 20, dtype=torch.float64)
    factorials = torch.tensor([math.lgamma(each) for each in whole.tolist()], dtype=torch.float64)
    torch.testing.assert_close(lgamma(whole), factorials, rtol=1e-14, atol=1e-14)


def test_digamma_is_that_of_torch():
    at = torch.cat([GAMMA_LINE, torch.tensor([0.0, -1.0, -7.0, torch.inf, torch.nan], dtype=torch.float64)])
    torch.testing.assert_close(digamma(at), torch.digamma(at), rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_derivatives_of_digamma_are_those_of_torch(order):
    at = GAMMA_LINE[GAMMA_LINE > 0] if order > 1 else GAMMA_LINE
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
    torch.testing.assert_close(polygamma(0, GAMMA_LINE), digamma(GAMMA_LINE))
    for function, torchs in ((lgamma, torch.lgamma), (digamma, torch.digamma)):
        torch.testing.assert_close(function(torch.arange(1, 5)), torchs(torch.arange(1, 5)))
        assert function(torch.ones(2)).dtype == torch.float32


def test_the_gradients_are_those_of_torch():
    at = GAMMA_LINE[(GAMMA_LINE > 0.01) & (GAMMA_LINE < 1e6)]
    assert_as_torch({"lgamma", "digamma"}, torch.lgamma, at)
    assert_as_torch({"polygamma"}, lambda x: torch.polygamma(2, x), at)


def test_likelihoods_are_right_in_onnxruntime():
    def likelihoods(x: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape, rate = x.exp(), rate.exp()
        gamma = torch.distributions.Gamma(shape, rate, validate_args=False)
        counts = torch.distributions.NegativeBinomial(shape, logits=rate, validate_args=False)
        return gamma.log_prob(x.abs() + 1), counts.log_prob(torch.ones(3, 4)), gamma.entropy()

    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(3, 4, generator=generator) for _ in range(2))
    assert_right_in_onnxruntime(likelihoods, *inputs)
