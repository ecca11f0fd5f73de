"""Operators of complex numbers as those of their real and imaginary parts, where torch's exporter (2.13) has none.

There a complex tensor is one of reals, with a last axis of length 2, and ``view_as_real`` and ``view_as_complex`` do
nothing. It has Fourier transforms and some plain operators; mixed with reals, or moved along axes, others lack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["TABLE", "added_to"]

_aten = torch.ops.aten
# Powers are products; a graph of more of them is no longer small.
_POWERS = range(1, 9)


def added_to(table: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Return a table that does what this one does with complex numbers, and what it did with all others."""
    return {**table, **{op: _choice(function, table.get(op)) for op, function in TABLE.items()}}


def _choice(of_complex: Callable[..., Any], of_others: Callable[..., Any] | None) -> Callable[..., Any]:
    @functools.wraps(of_complex)
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        if any(_is_complex(each) for each in tree_leaves((args, kwargs))):
            return of_complex(*args, **kwargs)
        return NotImplemented if of_others is None else of_others(*args, **kwargs)

    return decomposition


def _is_complex(value: Any) -> bool:
    if isinstance(value, torch.dtype | Tensor):
        return value.is_complex if isinstance(value, torch.dtype) else value.is_complex()
    return isinstance(value, complex)


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the real and the imaginary part of a tensor or a number; that of a real one is the number 0."""
    if not isinstance(value, Tensor):
        return complex(value).real, complex(value).imag
    if not value.is_complex():
        return value, 0.0
    pair = torch.view_as_real(value.resolve_conj())
    return pair.select(-1, 0), pair.select(-1, 1)


def _whole(real: Any, imaginary: Any, dtype: torch.dtype) -> Tensor:
    """Return the complex tensor of these parts; one of them may be a number."""
    like = real if isinstance(real, Tensor) else imaginary
    kind = dtype.to_real()
    parts = [
        each.to(kind) if isinstance(each, Tensor) else torch.full_like(like, each, dtype=kind)
        for each in (real, imaginary)
    ]
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(*parts), -1))  # type: ignore[no-untyped-call]


def _of_pairs(operator: Any, *, axes_added: int = 0) -> Callable[..., Any]:
    """Return an operator of the pairs; its second argument is an axis, to be counted from the first."""

    def moved(x: Tensor, dim: int, *args: Any) -> Tensor:
        pairs = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(operator(pairs, dim % max(x.ndim + axes_added, 1), *args).contiguous())

    return moved


def _full(
    size: Sequence[int],
    fill_value: complex,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_kwargs: Any,
) -> Tensor:
    """Return a tensor of one number."""
    dtype = dtype or torch.get_default_dtype().to_complex()
    if not dtype.is_complex:
        return NotImplemented  # type: ignore[no-any-return]
    real, imaginary = (torch.full(size, part, dtype=dtype.to_real(), device=device) for part in _parts(fill_value))
    return _whole(real, imaginary, dtype)


def _full_like(x: Tensor, fill_value: complex, *, dtype: torch.dtype | None = None, **_kwargs: Any) -> Tensor:
    dtype = dtype or x.dtype
    if not dtype.is_complex:
        return torch.full(x.shape, fill_value, dtype=dtype, device=x.device)
    return _full(x.shape, fill_value, dtype=dtype, device=x.device)


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, **_kwargs: Any) -> Tensor:
    """Return ``x`` in another dtype; the real part, if that is real."""
    dtype = dtype or x.dtype
    real, imaginary = _parts(x)
    if not dtype.is_complex:
        return real.to(dtype)  # type: ignore[no-any-return]
    return _whole(real, imaginary, dtype)


def _convert_element_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _to_copy(x, dtype=dtype)


def _expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Tensor:
    """Return ``x`` repeated along axes of length 1."""
    return torch.view_as_complex(torch.view_as_real(x.resolve_conj()).expand(*size, 2).contiguous())


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Return the elements at these indices."""
    return torch.view_as_complex(_aten.index(torch.view_as_real(x.resolve_conj()), indices).contiguous())


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """Return ``x`` with ``values`` at these indices, or added there."""
    pairs, written = (torch.view_as_real(each.resolve_conj()) for each in (x, values))
    return torch.view_as_complex(_aten.index_put(pairs, indices, written, accumulate))


def _constant_pad(x: Tensor, pad: Sequence[int], value: complex = 0) -> Any:
    """Return ``x`` with zeros around it."""
    if value != 0:
        return NotImplemented
    pairs = torch.view_as_real(x.resolve_conj())
    return torch.view_as_complex(_aten.constant_pad_nd(pairs, [0, 0, *pad]).contiguous())


def _eq(x: Any, y: Any) -> Tensor:
    """Return where both parts are the same."""
    (a, b), (c, d) = _parts(x), _parts(y)
    return torch.logical_and(torch.eq(a, c), torch.eq(b, d))


def _ne(x: Any, y: Any) -> Tensor:
    return _eq(x, y).logical_not()


def _add(x: Any, y: Any, *, alpha: complex = 1) -> Tensor:
    """Return x + alpha y."""
    if alpha != 1:
        y = _mul(y, alpha) if isinstance(y, Tensor) else y * alpha
    (a, b), (c, d) = _parts(x), _parts(y)
    return _whole(a + c, b + d, torch.result_type(x, y))


def _sub(x: Any, y: Any, *, alpha: complex = 1) -> Tensor:
    """Return x - alpha y."""
    return _add(x, y, alpha=-alpha)


def _mul(x: Any, y: Any) -> Tensor:
    """Return (a + bi) (c + di) = ac - bd + (ad + bc) i."""
    (a, b), (c, d) = _parts(x), _parts(y)
    dtype = torch.result_type(x, y)
    if not dtype.is_complex:  # alpha times a real tensor
        return _aten.mul(x, y)  # type: ignore[no-any-return]
    if _is_zero(d):
        return _whole(a * c, b * c, dtype)
    if _is_zero(b):
        return _whole(a * c, a * d, dtype)
    return _whole(a * c - b * d, a * d + b * c, dtype)


def _div(x: Any, y: Any) -> Tensor:
    """Return (a + bi) / (c + di), by the conjugate of the divisor, whose square is held from overflow.

    Source: Stewart, ACM Trans. Math. Software 11 (1985) 238, who scales by the larger part.
    """
    (a, b), (c, d) = _parts(x), _parts(y)
    dtype = torch.result_type(x, y)
    if _is_zero(d):
        return _whole(a / c, b / c, dtype)
    if not isinstance(y, Tensor):
        return _mul(x, 1 / complex(y))
    scale = torch.maximum(c.abs(), d.abs())
    c, d = c / scale, d / scale
    square = c * c + d * d
    return _whole((a * c + b * d) / square / scale, (b * c - a * d) / square / scale, dtype)


def _is_zero(part: Any) -> bool:
    return not isinstance(part, Tensor) and part == 0


def _exp(x: Tensor) -> Tensor:
    """Return e^a (cos b + i sin b)."""
    real, imaginary = _parts(x)
    size = real.exp()
    return _whole(size * imaginary.cos(), size * imaginary.sin(), x.dtype)


def _pow(x: Tensor, exponent: complex) -> Tensor:
    """Return a small whole power, as a product; others are refused: their branch cuts are many."""
    if exponent not in _POWERS:
        return NotImplemented  # type: ignore[no-any-return]
    return functools.reduce(_mul, [x] * int(exponent.real)) if exponent != 1 else x.clone()


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return ``x`` where the condition holds, ``y`` elsewhere."""
    (a, b), (c, d) = _parts(x), _parts(y)
    dtype = torch.result_type(x, y)
    return _whole(torch.where(condition, a, c), torch.where(condition, b, d), dtype)


def _matmul(operator: Any) -> Callable[..., Any]:
    def product(x: Tensor, y: Tensor) -> Tensor:
        """Return the product of matrices, or of batches of them, as ``_mul`` does."""
        (a, b), (c, d) = _parts(x), _parts(y)
        return _whole(operator(a, c) - operator(b, d), operator(a, d) + operator(b, c), x.dtype)

    return product


def _conj(x: Any) -> Tensor:
    """Return a - bi; that of a number, which it is in the gradient of a product with one, is a tensor."""
    if not isinstance(x, Tensor):
        return _full((), x.conjugate(), dtype=torch.complex128)
    real, imaginary = _parts(x)
    return _whole(real, -imaginary, x.dtype)


TABLE: dict[Any, Callable[..., Any]] = {
    _aten._conj.default: _conj,
    _aten._conj_physical.default: _conj,
    _aten._to_copy.default: _to_copy,
    _aten.add.Scalar: _add,
    _aten.add.Tensor: _add,
    _aten.bmm.default: _matmul(torch.bmm),
    _aten.conj_physical.default: _conj,
    _aten.constant_pad_nd.default: _constant_pad,
    _aten.cumsum.default: _of_pairs(torch.cumsum),
    _aten.div.Scalar: _div,
    _aten.div.Tensor: _div,
    _aten.eq.Scalar: _eq,
    _aten.eq.Tensor: _eq,
    _aten.exp.default: _exp,
    _aten.expand.default: _expand,
    _aten.full.default: _full,
    _aten.full_like.default: _full_like,
    _aten.index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten.index_select.default: _of_pairs(torch.index_select),
    _aten.mm.default: _matmul(torch.mm),
    _aten.mul.Scalar: _mul,
    _aten.mul.Tensor: _mul,
    _aten.ne.Scalar: _ne,
    _aten.ne.Tensor: _ne,
    _aten.pow.Tensor_Scalar: _pow,
    _aten.select.int: _of_pairs(torch.select),
    _aten.sub.Scalar: _sub,
    _aten.sub.Tensor: _sub,
    _aten.unsqueeze.default: _of_pairs(torch.unsqueeze, axes_added=1),
    _aten.where.self: _where,
    torch.ops.prims.convert_element_type.default: _convert_element_type,
}
