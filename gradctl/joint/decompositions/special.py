"""Functions of single elements, and products, that torch's exporter lacks or loses digits of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TABLE"]

_aten = torch.ops.aten

# log(erfcx(x) / t) in Chebyshev polynomials of 2 t - 1, t = 2 / (2 + x), for x >= 0: relative error 1e-14. The form is
# that of Press et al., Numerical Recipes (2007), section 6.2.2; interpolated at 32 Chebyshev nodes.
_ERFCX = (
    -0.651326859890855,
    0.6419697923564902,
    0.019476473204186037,
    -0.009561514786808884,
    -0.0009465953444818013,
    0.0003668394978529062,
    4.252332480650209e-05,
    -2.0278578112908705e-05,
    -1.6242900047838714e-06,
    1.3036558354229158e-06,
    1.5626442193542696e-08,
    -8.523809592487283e-08,
    6.529054364055936e-09,
    5.059343471099119e-09,
    -9.913645247223241e-10,
    -2.2736462288602112e-10,
    9.646770913229728e-11,
    2.394141555506967e-12,
    -6.886024304203636e-12,
    8.943581642904023e-13,
    3.132319403060099e-13,
    -1.125300044057401e-13,
)

# Numerators and denominators of the quantile of the normal distribution, from the lowest power: about the median, and
# in the tails by sqrt(-log p) up to 5 and beyond. Relative error 1e-16.
# Source: Wichura, Applied Statistics 37 (1988) 477, algorithm AS 241, PPND16.
_MEDIAN = (
    (
        3.3871328727963666080,
        133.14166789178437745,
        1971.5909503065514427,
        13731.693765509461125,
        45921.953931549871457,
        67265.770927008700853,
        33430.575583588128105,
        2509.0809287301226727,
    ),
    (
        1.0,
        42.313330701600911252,
        687.18700749205790830,
        5394.1960214247511077,
        21213.794301586595867,
        39307.895800092710610,
        28729.085735721942674,
        5226.4952788528545610,
    ),
)
_TAIL = (
    (
        1.42343711074968357734,
        4.63033784615654529590,
        5.76949722146069140550,
        3.64784832476320460504,
        1.27045825245236838258,
        0.241780725177450611770,
        0.0227238449892691845833,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187,
        1.67638483018380384940,
        0.689767334985100004550,
        0.148103976427480074590,
        0.0151986665636164571966,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720,
        5.46378491116411436990,
        1.78482653991729133580,
        0.296560571828504891230,
        0.0265321895265761230930,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        0.599832206555887937690,
        0.136929880922735805310,
        0.0148753612908506148525,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)


def _log1p(self: Tensor) -> Tensor:
    """Return log(1 + x) that keeps the digits of a small x; torch.onnx (2.13) takes it literally.

    Source: Goldberg, ACM Computing Surveys 23 (1991), theorem 4.
    """
    if not self.is_floating_point():
        return _log1p(self.to(torch.get_default_dtype()))
    whole = 1 + self
    kept = whole - 1
    ratio = torch.where(kept == self, 1, self / kept)
    return torch.where(kept == 0, self, whole.log() * ratio)


def _expm1(self: Tensor) -> Tensor:
    """Return exp(x) - 1 that keeps the digits of a small x: 2 tanh(x / 2) / (1 - tanh(x / 2)) where nothing cancels."""
    if not self.is_floating_point():
        return _expm1(self.to(torch.get_default_dtype()))
    half = (self / 2).tanh()
    return torch.where(self.abs() < 1, 2 * half / (1 - half), self.exp() - 1)


def _erfcx(self: Tensor) -> Tensor:
    """Return exp(x^2) erfc(x); torch.onnx (2.13) multiplies the two, of which one overflows."""
    if not self.is_floating_point():
        return _erfcx(self.to(torch.get_default_dtype()))
    t = 2 / (2 + self.abs())
    twice = 2 * (2 * t - 1)
    before, last = torch.zeros_like(t), torch.zeros_like(t)
    for coefficient in reversed(_ERFCX[1:]):  # Clenshaw's recurrence
        before, last = last, twice * last - before + coefficient
    positive = t * torch.exp(twice / 2 * last - before + _ERFCX[0])
    return torch.where(self < 0, 2 * torch.exp(self * self) - positive, positive)


def _log_ndtr(self: Tensor) -> Tensor:
    """Return the logarithm of the normal distribution function; far left of 0 by erfcx, which does not vanish."""
    if not self.is_floating_point():
        return _log_ndtr(self.to(torch.get_default_dtype()))
    scaled = self * math.sqrt(0.5)
    left = (_erfcx(-scaled.clamp_max(0)) / 2).log() - scaled * scaled
    right = _log1p(-torch.erfc(scaled.clamp_min(-1)) / 2)
    return torch.where(self < -1, left, right)


def _erfinv(self: Tensor) -> Tensor:
    """Return the inverse of the error function."""
    if not self.is_floating_point():
        return _erfinv(self.to(torch.get_default_dtype()))
    return _normal_quantile(self / 2, (1 - self.abs()) / 2) * math.sqrt(0.5)


def _ndtri(self: Tensor) -> Tensor:
    """Return the inverse of the normal distribution function."""
    if not self.is_floating_point():
        return _ndtri(self.to(torch.get_default_dtype()))
    return _normal_quantile(self - 0.5, torch.minimum(self, 1 - self))


def _normal_quantile(beside_half: Tensor, tail: Tensor) -> Tensor:
    """Return the quantile of a probability: of its difference from 1/2, and of the smaller of it and 1 less it."""
    near = beside_half * _ratio(_MEDIAN, 0.180625 - beside_half * beside_half)
    distance = (-tail.log()).sqrt()
    far = torch.where(distance <= 5, _ratio(_TAIL, distance - 1.6), _ratio(_FAR_TAIL, distance - 5))
    far = torch.where(tail == 0, torch.inf, far)
    return torch.where(beside_half.abs() <= 0.425, near, torch.where(beside_half < 0, -far, far))


def _ratio(of: tuple[Sequence[float], Sequence[float]], x: Tensor) -> Tensor:
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for numerator, denominator in zip(*map(reversed, of), strict=True):
        above, below = above * x + numerator, below * x + denominator
    return above / below


def _hypot(self: Tensor, other: Tensor) -> Tensor:
    """Return sqrt(x^2 + y^2), by the ratio of the smaller to the larger one: the squares may overflow."""
    first, second = self.abs(), other.abs()
    larger, smaller = torch.maximum(first, second), torch.minimum(first, second)
    ratio = smaller / torch.where((larger == 0) | (larger == torch.inf), 1, larger)
    found = larger * (ratio * ratio + 1).sqrt()
    return torch.where((first == torch.inf) | (second == torch.inf), torch.inf, found)


def _copysign(self: Tensor, other: Tensor | float) -> Tensor:
    """Return the size of one with the sign of the other; 0 has one too."""
    if not self.is_floating_point():
        self = self.to(torch.get_default_dtype())
    size = self.abs()
    if isinstance(other, Tensor):
        return torch.where(_signbit(other), -size, size)
    return -size if math.copysign(1.0, other) < 0 else size.clone()


def _signbit(self: Tensor) -> Tensor:
    """Return where the sign is a minus, which is that of its inverse for 0."""
    return (self < 0) | (1 / self < 0) if self.is_floating_point() else self < 0


def _shrink_backward(grad: Tensor, self: Tensor, lambd: float) -> Tensor:
    """Return the gradient of softshrink and hardshrink: that of the identity outside [-lambd, lambd]."""
    return torch.where((self >= -lambd) & (self <= lambd), 0, grad)


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Return the product of three tensors with new axes, summed over ``sumdim``.

    Source: aten/src/ATen/native/Linear.cpp.
    """
    for axes, which in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for axis in axes:
            i1, i2, i3 = (each.unsqueeze(axis) if which == k else each for k, each in enumerate((i1, i2, i3)))
    product = i1 * i2 * i3
    return product.sum(list(sumdim)) if sumdim else product


def _weight_norm_interface_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of g v / |v| by v and g, the norm over all axes but ``dim``.

    Source: torch/csrc/autograd/FunctionsManual.cpp and aten/src/ATen/native/WeightNorm.cpp.
    """
    others = [axis for axis in range(saved_v.ndim) if axis != dim]
    along = (saved_v * grad_w).sum(others, keepdim=True)
    by_v = saved_g / saved_norms * (grad_w - saved_v * (along / (saved_norms * saved_norms)))
    return by_v, along / saved_norms


def _vector_norm(
    self: Tensor,
    ord: float = 2,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm; torch.onnx (2.13) forgets ``keepdim`` where no axis is named."""
    if dim is not None and dim != []:
        return NotImplemented  # type: ignore[no-any-return]
    axes = list(range(self.ndim))
    return _aten.linalg_vector_norm(self, ord, axes, keepdim, dtype=dtype) if axes else NotImplemented


def _clamp(self: Tensor, min: float | None = None, max: float | None = None) -> Any:
    """Return integers within bounds; torch.onnx (2.13) makes Relu of a bound at 0, which onnxruntime has for floats.

    Of floats, both bounds become so: the exporter finds no overload for an integer and a float.
    """
    if self.is_floating_point():
        mixed = {type(min), type(max)} == {int, float}
        return _aten.clamp.default(self, float(min or 0), float(max or 0)) if mixed else NotImplemented
    above = self if min is None else torch.where(self < min, min, self)
    return above if max is None else torch.where(above > max, max, above)


def _logsumexp(self: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """Return log sum exp without overflow, as ``torch._refs`` does; a scalar as it is: ONNX reduces none."""
    if not self.ndim:
        return self.clone()
    axes = list(dim) or list(range(self.ndim))
    largest = self.amax(axes, keepdim=True)
    largest = torch.where(largest.abs() == float("inf"), 0, largest)
    total = (self - largest).exp().sum(axes, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(axes)


def _amax(self: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """Return the maximum over all axes where none is named, which torch.onnx (2.13) refuses; a scalar as it is."""
    if not self.ndim:
        return self.clone()
    return NotImplemented if len(dim) else _aten.amax(self, list(range(self.ndim)), keepdim)


def _amin(self: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """Return the minimum as ``_amax`` does the maximum."""
    if not self.ndim:
        return self.clone()
    return NotImplemented if len(dim) else _aten.amin(self, list(range(self.ndim)), keepdim)


def _fmax(self: Tensor, other: Tensor) -> Tensor:
    """Return the larger one; a number where the other is none."""
    return torch.where((self >= other) | torch.isnan(other), self, other)


def _fmin(self: Tensor, other: Tensor) -> Tensor:
    """Return the smaller one; a number where the other is none."""
    return torch.where((self <= other) | torch.isnan(other), self, other)


def _relu(self: Tensor) -> Any:
    """Return integers above 0: onnxruntime (1.32) has a kernel for floats alone."""
    return NotImplemented if self.is_floating_point() else torch.where(self < 0, 0, self)


def _squeeze_dims(self: Tensor, dim: Sequence[int]) -> Tensor:
    """Return a tensor without these axes where their size is 1; torch writes a squeeze of one axis as this one."""
    if not self.ndim:
        return self.clone()
    axes = {each % self.ndim for each in dim}
    return self.reshape([size for axis, size in enumerate(self.shape) if axis not in axes or size != 1])


def _max_dim(self: Tensor, dim: int, keepdim: bool = False) -> Any:
    """Return the maximum of booleans, and where it is; ONNX finds that of numbers only."""
    if self.dtype != torch.bool:
        return NotImplemented
    values, places = _aten.max.dim(self.to(torch.int32), dim, keepdim)
    return values != 0, places


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._trilinear.default: _trilinear,
    _aten._weight_norm_interface_backward.default: _weight_norm_interface_backward,
    _aten.amax.default: _amax,
    _aten.amin.default: _amin,
    _aten.clamp.default: _clamp,
    _aten.copysign.Scalar: _copysign,
    _aten.copysign.Tensor: _copysign,
    _aten.erfinv.default: _erfinv,
    _aten.expm1.default: _expm1,
    _aten.fmax.default: _fmax,
    _aten.fmin.default: _fmin,
    _aten.hardshrink_backward.default: _shrink_backward,
    _aten.hypot.default: _hypot,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten.log1p.default: _log1p,
    _aten.logsumexp.default: _logsumexp,
    _aten.max.dim: _max_dim,
    _aten.relu.default: _relu,
    _aten.signbit.default: _signbit,
    _aten.softshrink_backward.default: _shrink_backward,
    _aten.special_erfcx.default: _erfcx,
    _aten.special_log_ndtr.default: _log_ndtr,
    _aten.special_ndtri.default: _ndtri,
    _aten.squeeze.dims: _squeeze_dims,
    torch.ops.prims.view_of.default: lambda each: each.clone(),
}
