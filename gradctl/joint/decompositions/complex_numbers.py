"""Operators of complex numbers as those of their real and imaginary parts, and Fourier transforms as matrix products.

torch's exporter (2.13) represents a complex tensor by reals with a last axis of length 2; ``view_as_real`` and
``view_as_complex`` do nothing there. It exports Fourier transforms and some elementwise operators, but not complex
tensors mixed with reals, or moved along axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import Ints, Table, decomposes
from gradctl.subject.torch_private import tree_leaves

_aten = torch.ops.aten
_LONGEST_POWER = 8  # a power is a graph of so many products

# onnxruntime's DFT (1.32) has an error of 1e-5 of the largest value if a length is not a power of two; a product rounds
# like any other. Of 200 rows on one thread it takes 0.6 ms where DFT takes 29 (length 400), 0.95 for 1.6 (512), 17 for
# 3.6 (1024). Longer ones are left to DFT: the matrices have as many elements as the square of the length.
_LONGEST, _LONGEST_POWER_OF_TWO = 1024, 512  # 16 MiB of roots; DFT is right for a power of two, and soon faster

COMPLEX: Table = {}  # calls without complex arguments are left to REAL
_decomposes = functools.partial(decomposes, table=COMPLEX)


def with_complex(reals: Table, of_complex: Table) -> Table:
    """Return a table that uses ``of_complex`` for calls with complex arguments, and ``reals`` for others."""
    return {**reals, **{op: _choice(function, reals.get(op)) for op, function in of_complex.items()}}


def _choice(of_complex: Callable[..., Any], of_reals: Callable[..., Any] | None) -> Callable[..., Any]:
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        if any(_is_complex(each) for each in tree_leaves((args, kwargs))):
            return of_complex(*args, **kwargs)
        return NotImplemented if of_reals is None else of_reals(*args, **kwargs)

    return decomposition


def _is_complex(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_complex()
    return value.is_complex if isinstance(value, torch.dtype) else isinstance(value, complex)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the real and the imaginary part of a tensor or a number; that of a real one is the number 0."""
    if not isinstance(value, Tensor):
        return complex(value).real, complex(value).imag
    if not value.is_complex():
        return value, 0.0
    pairs = _pairs(value)
    return pairs.select(-1, 0), pairs.select(-1, 1)


def _joined(real: Any, imaginary: Any, dtype: torch.dtype) -> Tensor:
    """Return the complex tensor of two parts; one of them may be a number."""
    like = real if isinstance(real, Tensor) else imaginary
    kind = dtype.to_real()
    parts = [
        each.to(kind) if isinstance(each, Tensor) else torch.full_like(like, each, dtype=kind)
        for each in (real, imaginary)
    ]
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(*parts), -1))  # type: ignore[no-untyped-call]


@_decomposes(_aten.cumsum.default, operator=torch.cumsum)
@_decomposes(_aten.index_select.default, operator=torch.index_select)
@_decomposes(_aten.select.int, operator=torch.select)
@_decomposes(_aten.unsqueeze.default, operator=torch.unsqueeze, axes_added=1)
def _along_axis(x: Tensor, dim: int, *args: Any, operator: Any, axes_added: int = 0) -> Tensor:
    """Return an operator along an axis of the pairs, which is counted from the first."""
    return _complex(operator(_pairs(x), dim % max(x.ndim + axes_added, 1), *args))


@_decomposes(_aten.expand.default)
def _expand(x: Tensor, size: Ints, *, implicit: bool = False) -> Tensor:
    return _complex(_pairs(x).expand(*size, 2))


@_decomposes(_aten.index.Tensor)
def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    return _complex(_aten.index(_pairs(x), indices))


@_decomposes(_aten.index_put.default)
def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    return torch.view_as_complex(_aten.index_put(_pairs(x), indices, _pairs(values), accumulate))


@_decomposes(_aten.constant_pad_nd.default)
def _constant_pad(x: Tensor, pad: Ints, value: complex = 0) -> Any:
    return _complex(_aten.constant_pad_nd(_pairs(x), [0, 0, *pad])) if value == 0 else NotImplemented


@_decomposes(_aten.full.default)
def _full(
    size: Ints, fill_value: complex, *, dtype: Any = None, device: torch.device | None = None, **_kwargs: Any
) -> Any:
    dtype = dtype or torch.get_default_dtype().to_complex()
    if not dtype.is_complex:
        return NotImplemented
    real, imaginary = (torch.full(size, part, dtype=dtype.to_real(), device=device) for part in _parts(fill_value))
    return _joined(real, imaginary, dtype)


@_decomposes(_aten.full_like.default)
def _full_like(x: Tensor, fill_value: complex, *, dtype: torch.dtype | None = None, **_kwargs: Any) -> Any:
    dtype = dtype or x.dtype
    full = _full if dtype.is_complex else torch.full
    return full(x.shape, fill_value, dtype=dtype, device=x.device)


@_decomposes(_aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def _to_copy(x: Tensor, dtype: torch.dtype | None = None, **_kwargs: Any) -> Any:
    """Return ``x`` in another dtype; the real part, if that is real."""
    dtype = dtype or x.dtype
    real, imaginary = _parts(x)
    return _joined(real, imaginary, dtype) if dtype.is_complex else real.to(dtype)


@_decomposes(_aten.eq.Scalar, _aten.eq.Tensor)
def _eq(x: Any, y: Any) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y)
    return torch.logical_and(torch.eq(a, c), torch.eq(b, d))


@_decomposes(_aten.ne.Scalar, _aten.ne.Tensor)
def _ne(x: Any, y: Any) -> Tensor:
    return _eq(x, y).logical_not()


@_decomposes(_aten.add.Scalar, _aten.add.Tensor)
def _add(x: Any, y: Any, *, alpha: complex = 1) -> Tensor:
    if alpha != 1:
        y = _mul(y, alpha) if isinstance(y, Tensor) else y * alpha
    (a, b), (c, d) = _parts(x), _parts(y)
    return _joined(a + c, b + d, torch.result_type(x, y))


@_decomposes(_aten.sub.Scalar, _aten.sub.Tensor)
def _sub(x: Any, y: Any, *, alpha: complex = 1) -> Tensor:
    return _add(x, y, alpha=-alpha)


@_decomposes(_aten.mul.Scalar, _aten.mul.Tensor)
def _mul(x: Any, y: Any) -> Any:
    """Return (a + bi) (c + di) = ac - bd + (ad + bc) i."""
    (a, b), (c, d) = _parts(x), _parts(y)
    dtype = torch.result_type(x, y)
    if not dtype.is_complex:  # alpha times a real tensor
        return _aten.mul(x, y)
    if _is_zero(d):
        return _joined(a * c, b * c, dtype)
    if _is_zero(b):
        return _joined(a * c, a * d, dtype)
    return _joined(a * c - b * d, a * d + b * c, dtype)


@_decomposes(_aten.div.Scalar, _aten.div.Tensor)
def _div(x: Any, y: Any) -> Any:
    """Return (a + bi) / (c + di), by the conjugate of the divisor, scaled so that its square does not overflow.

    Source: Stewart, ACM Trans. Math. Software 11 (1985) 238, who scales by the larger part.
    """
    (a, b), (c, d) = _parts(x), _parts(y)
    dtype = torch.result_type(x, y)
    if _is_zero(d):
        return _joined(a / c, b / c, dtype)
    if not isinstance(y, Tensor):
        return _mul(x, 1 / complex(y))
    scale = torch.maximum(c.abs(), d.abs())
    c, d = c / scale, d / scale
    square = c * c + d * d
    return _joined((a * c + b * d) / square / scale, (b * c - a * d) / square / scale, dtype)


def _is_zero(part: Any) -> bool:
    return not isinstance(part, Tensor) and part == 0


@_decomposes(_aten.mm.default, operator=torch.mm)
@_decomposes(_aten.bmm.default, operator=torch.bmm)
def _matmul(x: Tensor, y: Tensor, *, operator: Any) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y)
    return _joined(operator(a, c) - operator(b, d), operator(a, d) + operator(b, c), x.dtype)


@_decomposes(_aten.exp.default)
def _exp(x: Tensor) -> Tensor:
    """Return e^a (cos b + i sin b)."""
    real, imaginary = _parts(x)
    size = real.exp()
    return _joined(size * imaginary.cos(), size * imaginary.sin(), x.dtype)


@_decomposes(_aten.pow.Tensor_Scalar)
def _pow(x: Tensor, exponent: complex) -> Any:
    """Return a small whole power, as a product; others are left to torch: they have branch cuts."""
    if exponent not in range(1, _LONGEST_POWER + 1):
        return NotImplemented
    return functools.reduce(_mul, [x] * int(exponent.real)) if exponent != 1 else x.clone()


@_decomposes(_aten.where.self)
def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    (a, b), (c, d) = _parts(x), _parts(y)
    return _joined(torch.where(condition, a, c), torch.where(condition, b, d), torch.result_type(x, y))


# The gradient of a product with a number conjugates the number.
@_decomposes(_aten._conj.default, _aten._conj_physical.default, _aten.conj_physical.default)
def _conj(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return _full((), x.conjugate(), dtype=torch.complex128)
    real, imaginary = _parts(x)
    return _joined(real, -imaginary, x.dtype)


@decomposes(_aten._fft_r2c.default)
def _fft_r2c(self: Tensor, dim: Ints, normalization: int, onesided: bool) -> Any:
    sizes = [self.shape[axis] for axis in dim]
    if not _is_short(self, sizes):
        return NotImplemented
    *others, last = [axis % self.ndim for axis in dim]
    count = sizes[-1] // 2 + 1 if onesided else sizes[-1]
    scaled = self * _factor(normalization, sizes)
    roots = _roots(sizes[-1], count, self, -1).reshape(sizes[-1], 2 * count)
    return _transform(_from_last_axis(scaled.movedim(last, -1) @ roots, last), others, -1)


@decomposes(_aten._fft_c2c.default)
def _fft_c2c(self: Tensor, dim: Ints, normalization: int, forward: bool) -> Any:
    sizes = [self.shape[axis] for axis in dim]
    if not _is_short(self, sizes) or not sizes:
        return NotImplemented
    found = _transform(self, [axis % self.ndim for axis in dim], -1 if forward else 1)
    return found * _factor(normalization, sizes)


@decomposes(_aten._fft_c2r.default)
def _fft_c2r(self: Tensor, dim: Ints, normalization: int, last_dim_size: int) -> Any:
    *others, last = [axis % self.ndim for axis in dim]
    sizes = [*(self.shape[axis] for axis in others), last_dim_size]
    if not _is_short(self, sizes):
        return NotImplemented
    count = last_dim_size // 2 + 1
    pairs = _pairs(_transform(self, others, 1)).movedim(last, -2).narrow(-2, 0, count)
    at = torch.arange(count, device=self.device)
    # All but the first coefficient, and the last of an even length, occur twice: the conjugates are not stored.
    twice = 2 - ((at == 0) | (2 * at == last_dim_size)).to(pairs.dtype)
    matrix = _roots(last_dim_size, count, pairs, -1).permute(1, 2, 0) * twice.reshape(-1, 1, 1)
    found = pairs.flatten(-2) @ matrix.reshape(2 * count, last_dim_size)
    return found.movedim(-1, last) * _factor(normalization, sizes)


def _is_short(x: Tensor, sizes: Ints) -> bool:
    """Return whether the sizes are known and short enough for matrices."""
    are_short = all(
        isinstance(size, int) and size <= (_LONGEST if size & (size - 1) else _LONGEST_POWER_OF_TWO) for size in sizes
    )
    return are_short and x.dtype in {torch.float32, torch.float64, torch.complex64, torch.complex128}


def _transform(x: Tensor, axes: Ints, sign: int) -> Tensor:
    """Return the coefficients of a complex tensor along axes."""
    for axis in axes:
        pairs = _pairs(x).movedim(axis, -2)
        length = pairs.shape[-2]
        roots = _roots(length, length, pairs, sign)
        rotated = torch.stack([-roots[..., 1], roots[..., 0]], -1)  # i times the roots
        matrix = torch.stack([roots, rotated], 1).reshape(2 * length, 2 * length)
        x = _from_last_axis(pairs.flatten(-2) @ matrix, axis)
    return x


def _roots(length: int, count: int, like: Tensor, sign: int) -> Tensor:
    """Return exp(sign 2 pi i j k / length) for j below ``length`` and k below ``count``, as pairs."""
    half = length // 2
    rows, columns = torch.arange(length, device=like.device), torch.arange(count, device=like.device)
    # Within half a turn, so that the angles keep their digits.
    turns = (rows.unsqueeze(1) * columns + half) % length - half
    angles = turns.to(like.dtype) * (sign * 2 * math.pi / length)
    return torch.stack([angles.cos(), angles.sin()], -1)


def _from_last_axis(found: Tensor, dim: int) -> Tensor:
    """Return a complex tensor whose last axis, of pairs, is moved to ``dim``."""
    return _complex(found.reshape(*found.shape[:-1], found.shape[-1] // 2, 2).movedim(-2, dim))


def _factor(normalization: int, sizes: Ints) -> float:
    """Return 1, 1 / sqrt(n) or 1 / n (aten/src/ATen/native/SpectralOpsUtils.h)."""
    return float(math.prod(sizes) ** (-normalization / 2))
