"""The logarithm of the gamma function and its derivatives, which ONNX lacks.

They are taken in float64, by asymptotic series far from 0 and the recurrence down from there: of close terms that
cancel, too little would be left in float32. Formulas: NIST Digital Library of Mathematical Functions, 5.5.1 and 5.5.3,
5.11.1, 5.15.5 and 5.15.6, 25.11.3 and 25.11.43 (dlmf.nist.gov).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten
# Bernoulli numbers B2, B4 …
_BERNOULLI = tuple(
    float(Fraction(*each))
    for each in ((1, 6), (-1, 30), (1, 42), (-1, 30), (5, 66), (-691, 2730), (7, 6), (-3617, 510), (43867, 798))
)
_FAR = 9  # where the first term left out is below 1e-15 of the first, for orders up to 4


def _lgamma(self: Tensor) -> Tensor:
    """Return log |gamma(x)|; infinite at 0, -1, -2 …"""
    x = self.to(torch.float64)
    positive = torch.where(x > 0, x, 1 - x)
    near = positive.clamp_max(_FAR)
    product = near
    for step in range(1, _FAR):
        product = product * (near + step)
    is_near = positive < _FAR
    y = torch.where(is_near, positive + _FAR, positive)
    series = (y - 0.5) * y.log() - y + math.log(2 * math.pi) / 2
    for order, number in enumerate(_BERNOULLI, start=1):
        series = series + y ** (1 - 2 * order) * (number / (2 * order * (2 * order - 1)))
    found = torch.where(is_near, series - product.log(), series)
    turned = math.log(math.pi) - (_within_half(x) * math.pi).sin().abs().log() - found
    found = torch.where(x > 0, found, turned)
    # Of infinity the terms are infinite both ways.
    return torch.where(x.abs() == torch.inf, torch.inf, found).to(_type(self))


def _digamma(self: Tensor) -> Tensor:
    """Return the derivative of log gamma; no number at -1, -2 …, as torch has it."""
    x = self.to(torch.float64)
    found = _reflected(x, 0, _derivative_far(torch.where(x > 0, x, 1 - x), 0))
    found = torch.where((x < 0) & (x == x.round()), torch.nan, found)
    return found.to(_type(self))


def _polygamma(n: int, self: Tensor) -> Tensor:
    """Return the derivative of order n of digamma."""
    if n == 0:
        return _digamma(self)
    x = self.to(torch.float64)
    return _reflected(x, n, _derivative_far(torch.where(x > 0, x, 1 - x), n)).to(_type(self))


def _derivative_far(x: Tensor, n: int) -> Tensor:
    """Return polygamma of order n above 0: as a sum of powers up to some distance, and a series from there."""
    y = x + _FAR
    sign = -1.0 if n % 2 == 0 else 1.0
    if n == 0:
        total = y.log() - 0.5 / y
    else:
        total = sign * (math.factorial(n - 1) * y**-n + math.factorial(n) / 2 * y ** (-n - 1))
    for order, number in enumerate(_BERNOULLI, start=1):
        weight = number * math.factorial(2 * order + n - 1) / math.factorial(2 * order)
        total = total + sign * weight * y ** (-n - 2 * order)
    for step in range(_FAR):
        total = total + sign * math.factorial(n) * (x + step) ** (-n - 1)
    return total


def _reflected(x: Tensor, n: int, found: Tensor) -> Tensor:
    """Return ``found``, which is of 1 - x where x is not above 0, as that of x."""
    angle = _within_half(x) * math.pi
    cotangent = (angle + math.pi / 2).sin() / angle.sin()
    # The derivatives of cot(pi x) as polynomials of it: those of c are -pi (1 + c^2) times those by c.
    powers = [0.0, 1.0]
    for _ in range(n):
        slope = [power * each for power, each in enumerate(powers)][1:]
        powers = [-math.pi * (a + b) for a, b in zip([*slope, 0.0, 0.0], [0.0, 0.0, *slope], strict=True)]
    value = torch.full_like(cotangent, powers[-1])
    for each in reversed(powers[:-1]):  # Horner
        value = value * cotangent + each
    return torch.where(x > 0, found, (-1) ** n * found - math.pi * value)


def _within_half(x: Tensor) -> Tensor:
    """Return what is left of x beside the next whole number."""
    return x - x.round()


def _type(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


TABLE: dict[Any, Callable[..., Any]] = {
    _aten.digamma.default: _digamma,
    _aten.lgamma.default: _lgamma,
    _aten.polygamma.default: _polygamma,
}
