"""Special functions of single elements, which ONNX lacks or torch.onnx computes with a loss of digits.

Gamma functions are computed in float64, by asymptotic series far from 0 and the recurrence down from there: close terms
cancel, and float32 would keep too few digits. Formulas: NIST Digital Library of Mathematical Functions, 5.5.1, 5.5.3,
5.11.1, 5.15.5, 5.15.6, 25.11.3 and 25.11.43 (dlmf.nist.gov).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import decomposes

_aten = torch.ops.aten

# Bernoulli numbers B2, B4 …
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)
_FAR = 9  # from here the first omitted term is below 1e-15 of the first one, for orders up to 4

# fmt: off
# log(erfcx(x) / t) in Chebyshev polynomials of 2 t - 1, t = 2 / (2 + x), for x >= 0: relative error 1e-14. The form is
# that of Press et al., Numerical Recipes (2007), section 6.2.2; interpolated at 32 Chebyshev nodes.
_ERFCX = (
    -0.651326859890855, 0.6419697923564902, 0.019476473204186037, -0.009561514786808884,
    -0.0009465953444818013, 0.0003668394978529062, 4.252332480650209e-05, -2.0278578112908705e-05,
    -1.6242900047838714e-06, 1.3036558354229158e-06, 1.5626442193542696e-08, -8.523809592487283e-08,
    6.529054364055936e-09, 5.059343471099119e-09, -9.913645247223241e-10, -2.2736462288602112e-10,
    9.646770913229728e-11, 2.394141555506967e-12, -6.886024304203636e-12, 8.943581642904023e-13,
    3.132319403060099e-13, -1.125300044057401e-13,
)
# Numerators and denominators of the quantile of the normal distribution, from the lowest power: around the median, and
# in the tails by sqrt(-log p) up to 5 and beyond. Relative error 1e-16.
# Source: Wichura, Applied Statistics 37 (1988) 477, algorithm AS 241, PPND16.
_MEDIAN = (
    (
        3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
        45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727,
    ),
    (
        1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
        21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610,
    ),
)
_TAIL = (
    (
        1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
        1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4,
    ),
    (
        1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
        0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
        0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7,
    ),
    (
        1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
        7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15,
    ),
)
# fmt: on


def _float_type(x: Tensor) -> torch.dtype:
    """Return the dtype of a function's result: integers become floats."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


# torch.onnx (2.13) exports log(1 + x), which loses the digits of a small x.
@decomposes(_aten.log1p.default)
def _log1p(self: Tensor) -> Tensor:
    """Return log(1 + x). Source: Goldberg, ACM Computing Surveys 23 (1991), theorem 4."""
    x = self.to(_float_type(self))
    whole = 1 + x
    kept = whole - 1
    ratio = torch.where(kept == x, 1, x / kept)
    return torch.where(kept == 0, x, whole.log() * ratio)


# torch.onnx (2.13) exports exp(x) - 1, which loses the digits of a small x.
@decomposes(_aten.expm1.default)
def _expm1(self: Tensor) -> Tensor:
    """Return exp(x) - 1, as 2 tanh(x / 2) / (1 - tanh(x / 2)) if x is small: there nothing cancels."""
    x = self.to(_float_type(self))
    half = (x / 2).tanh()
    return torch.where(x.abs() < 1, 2 * half / (1 - half), x.exp() - 1)


# torch.onnx (2.13) exports the product of exp(x^2) and erfc(x), of which one overflows.
@decomposes(_aten.special_erfcx.default)
def _erfcx(self: Tensor) -> Tensor:
    """Return exp(x^2) erfc(x)."""
    x = self.to(_float_type(self))
    t = 2 / (2 + x.abs())
    twice = 2 * (2 * t - 1)
    before, last = torch.zeros_like(t), torch.zeros_like(t)
    for coefficient in reversed(_ERFCX[1:]):  # Clenshaw's recurrence
        before, last = last, twice * last - before + coefficient
    positive = t * torch.exp(twice / 2 * last - before + _ERFCX[0])
    return torch.where(x < 0, 2 * torch.exp(x * x) - positive, positive)


# torch decomposes it into erfcx, which overflows in torch.onnx (2.13): wrong far to the left.
@decomposes(_aten.special_log_ndtr.default)
def _log_ndtr(self: Tensor) -> Tensor:
    """Return the logarithm of the normal distribution function; left of -1 by erfcx, which does not underflow."""
    x = self.to(_float_type(self))
    scaled = x * math.sqrt(0.5)
    left = (_erfcx(-scaled.clamp_max(0)) / 2).log() - scaled * scaled
    right = _log1p(-torch.erfc(scaled.clamp_min(-1)) / 2)
    return torch.where(x < -1, left, right)


@decomposes(_aten.erfinv.default)
def _erfinv(self: Tensor) -> Tensor:
    x = self.to(_float_type(self))
    return _normal_quantile(x / 2, (1 - x.abs()) / 2) * math.sqrt(0.5)


@decomposes(_aten.special_ndtri.default)
def _ndtri(self: Tensor) -> Tensor:
    x = self.to(_float_type(self))
    return _normal_quantile(x - 0.5, torch.minimum(x, 1 - x))


def _normal_quantile(offset: Tensor, tail: Tensor) -> Tensor:
    """Return the quantile of a probability p, from ``offset`` = p - 1/2 and ``tail`` = min(p, 1 - p)."""
    near = offset * _ratio(_MEDIAN, 0.180625 - offset * offset)
    distance = (-tail.log()).sqrt()
    far = torch.where(distance <= 5, _ratio(_TAIL, distance - 1.6), _ratio(_FAR_TAIL, distance - 5))
    far = torch.where(tail == 0, torch.inf, far)
    return torch.where(offset.abs() <= 0.425, near, torch.where(offset < 0, -far, far))


def _ratio(of: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for numerator, denominator in zip(*map(reversed, of), strict=True):
        above, below = above * x + numerator, below * x + denominator
    return above / below


@decomposes(_aten.lgamma.default)
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
    reflected = math.log(math.pi) - ((x - x.round()) * math.pi).sin().abs().log() - found
    found = torch.where(x > 0, found, reflected)
    # At infinity the terms are infinite with both signs.
    return torch.where(x.abs() == torch.inf, torch.inf, found).to(_float_type(self))


@decomposes(_aten.digamma.default)
def _digamma(self: Tensor) -> Tensor:
    return _polygamma(0, self)


@decomposes(_aten.polygamma.default)
def _polygamma(n: int, self: Tensor) -> Tensor:
    """Return the derivative of order n + 1 of log gamma: a sum of powers near 0, an asymptotic series beyond."""
    x = self.to(torch.float64)
    near = torch.where(x > 0, x, 1 - x)
    y = near + _FAR
    sign = -1.0 if n % 2 == 0 else 1.0
    if n == 0:
        total = y.log() - 0.5 / y
    else:
        total = sign * (math.factorial(n - 1) * y**-n + math.factorial(n) / 2 * y ** (-n - 1))
    for order, number in enumerate(_BERNOULLI, start=1):
        weight = number * math.factorial(2 * order + n - 1) / math.factorial(2 * order)
        total = total + sign * weight * y ** (-n - 2 * order)
    for step in range(_FAR):
        total = total + sign * math.factorial(n) * (near + step) ** (-n - 1)
    found = torch.where(x > 0, total, (-1) ** n * total - math.pi * _cotangent_derivative(x, n))
    if n == 0:  # torch returns NaN at -1, -2 …
        found = torch.where((x < 0) & (x == x.round()), torch.nan, found)
    return found.to(_float_type(self))


def _cotangent_derivative(x: Tensor, n: int) -> Tensor:
    """Return the derivative of order n of cot(pi x), for the reflection formula."""
    angle = (x - x.round()) * math.pi
    cotangent = (angle + math.pi / 2).sin() / angle.sin()
    # A polynomial of the cotangent c, whose derivative by x is -pi (1 + c^2) times that by c.
    powers = [0.0, 1.0]
    for _ in range(n):
        slope = [power * each for power, each in enumerate(powers)][1:]
        powers = [-math.pi * (a + b) for a, b in zip([*slope, 0.0, 0.0], [0.0, 0.0, *slope], strict=True)]
    value = torch.full_like(cotangent, powers[-1])
    for each in reversed(powers[:-1]):  # Horner
        value = value * cotangent + each
    return value
