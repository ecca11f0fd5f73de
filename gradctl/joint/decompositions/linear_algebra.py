"""Linear algebra of real matrices: factors, and solutions by these factors, one column or row at a time.

The steps of small matrices are nodes of the graph; those of larger ones, and of symbolic sizes, are the body of ONNX's
Scan. Factors are those of LAPACK, up to rounding: rows exchanged for the largest element of a column (the first of
equals), signs of Householder's reflections.

A graph cannot raise: for a matrix that is singular or not positive definite, the results are infinite or NaN. There are
no eigenvalues and singular values: their iterations end at convergence. If the rank is known, a Cholesky or QR factor
serves as well.

Source: Golub and Van Loan, Matrix Computations (2013), sections 3.1, 3.4, 4.2, 5.1, 5.2 and 9.3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradctl.joint.decompositions.register import REAL, Ints, Table, decomposes
from gradctl.subject.torch_private import OpOverload, scan

_aten = torch.ops.aten
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Place = int | Tensor  # the number of a step: an integer, or a tensor of one
_UNROLLED = 4  # up to so many steps are nodes, 20 each; a Scan is as fast (onnxruntime 1.32) and exported sooner
_SQUARINGS = 32

EARLY: Table = {}  # for the first trace, in which autograd runs; matrices may have another layout in the second


def _decomposes(*overloads: OpOverload, table: Table = REAL) -> Callable[[_Function], _Function]:
    """Register a decomposition that leaves complex matrices, and factors without exchanges, to others."""

    def register(function: _Function) -> _Function:
        @functools.wraps(function)
        def of_reals(*args: Any, **kwargs: Any) -> Any:
            is_complex = any(isinstance(each, Tensor) and each.is_complex() for each in args)
            return NotImplemented if is_complex or not kwargs.get("pivot", True) else function(*args, **kwargs)

        decomposes(*overloads, table=table)(of_reals)
        return function

    return register


@decomposes(_aten._linalg_check_errors.default)
def _ignore_errors(*_: Any, **__: Any) -> None: ...


@decomposes(_aten._trilinear.default)
def _trilinear(
    i1: Tensor, i2: Tensor, i3: Tensor, expand1: Ints, expand2: Ints, expand3: Ints, sumdim: Ints, unroll_dim: int = 1
) -> Tensor:
    """Return the product of three tensors with new axes, summed over ``sumdim`` (aten/src/ATen/native/Linear.cpp)."""
    expansions = ((i1, expand1), (i2, expand2), (i3, expand3))
    factors = [functools.reduce(torch.unsqueeze, axes, each) for each, axes in expansions]
    product = factors[0] * factors[1] * factors[2]
    return product.sum(list(sumdim)) if sumdim else product


@_decomposes(_aten.linalg_lu_factor_ex.default)
def _linalg_lu_factor_ex(A: Tensor, *, pivot: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return L below the diagonal and U ``[*, m, n]``, the row that each was exchanged with, from 1, and info."""
    row, column = _rows(A), _columns(A)

    def step(k: _Place, matrix: Tensor, row: Tensor, column: Tensor) -> list[Tensor]:
        size = torch.where(row >= k, _at(matrix, -1, k).abs(), -1)
        largest = size.argmax(-2, keepdim=True)
        chosen = matrix.gather(-2, largest.expand(*largest.shape[:-1], matrix.shape[-1]))
        matrix = torch.where(row == largest, _at(matrix, -2, k), matrix)
        matrix = torch.where(row == k, chosen, matrix)
        top = _at(chosen, -1, k)
        # Below a pivot of 0 every element is 0.
        factor = torch.where(row > k, _at(matrix, -1, k) / torch.where(top == 0, 1, top), 0)
        matrix = matrix - factor * torch.where(column > k, chosen, 0)
        return [torch.where((column == k) & (row > k), factor, matrix), largest.squeeze(-1).squeeze(-1)]

    count = min(A.shape[-2:])
    factors, exchanged = _repeated(step, count, A, (row, column))
    pivots = (exchanged.movedim(0, -1) + 1).to(torch.int32)
    return factors, pivots, _first(factors.diagonal(0, -2, -1) == 0)


@_decomposes(_aten.linalg_lu.default)
def _linalg_lu(A: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, L and U."""
    factors, pivots, _ = _linalg_lu_factor_ex(A)
    return _lu_unpack(factors, pivots)


@_decomposes(_aten.lu_unpack.default)
def _lu_unpack(
    LU_data: Tensor, LU_pivots: Tensor, unpack_data: bool = True, unpack_pivots: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P ``[*, m, m]``, L ``[*, m, k]`` and U ``[*, k, n]``; those that are not requested are empty."""
    rows, columns = LU_data.shape[-2:]
    count = min(rows, columns)
    permutation, lower, upper = (LU_data.new_zeros(0) for _ in range(3))
    if unpack_pivots:
        order = _order(LU_pivots, rows)
        permutation = (_rows(LU_data) == order.unsqueeze(-2)).to(LU_data.dtype)
    if unpack_data:
        row, column = _rows(LU_data), _columns(LU_data)
        ones = (row == column).to(LU_data.dtype)
        lower = (torch.where(row > column, LU_data, 0) + ones).narrow(-1, 0, count)
        upper = torch.where(row <= column, LU_data, 0).narrow(-2, 0, count)
    return permutation, lower, upper


@_decomposes(_aten.linalg_lu_solve.default)
def _linalg_lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """Return X of A X = B, or X A = B; of the transpose of A with ``adjoint``."""
    if not left:
        return _linalg_lu_solve(LU, pivots, B.mT, adjoint=not adjoint).mT
    LU, B = _broadcast(LU, B)
    order = _order(pivots, LU.shape[-1]).unsqueeze(-1).expand(B.shape)
    if not adjoint:
        return _substituted(LU, _substituted(LU, B.gather(-2, order), upper=False, unit=True), upper=True)
    found = _substituted(LU.mT, _substituted(LU.mT, B, upper=False), upper=True, unit=True)
    placed: Tensor = _aten.scatter.src(torch.zeros_like(found), found.ndim - 2, order, found)
    return placed


@_decomposes(_aten._linalg_solve_ex.default)
def _linalg_solve_ex(
    A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return X of A X = B, or X A = B, with the factors, pivots and info of A; B may be a vector for each matrix."""
    factors, pivots, info = _linalg_lu_factor_ex(A)
    is_vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    found = _linalg_lu_solve(factors, pivots, B.unsqueeze(-1) if is_vector else B, left=left)
    return found.squeeze(-1) if is_vector else found, factors, pivots, info


@_decomposes(_aten.linalg_inv_ex.default)
def _linalg_inv_ex(A: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Return the inverse, and info."""
    factors, pivots, info = _linalg_lu_factor_ex(A)
    return _linalg_lu_solve(factors, pivots, _identity(A)), info


# Autograd takes the factors of a determinant as those of the transpose if the matrix is contiguous.
@_decomposes(_aten._linalg_det.default, table=EARLY)
def _linalg_det(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the determinant, with factors and pivots."""
    factors, pivots, sign, diagonal = _triangular(A)
    return sign * diagonal.prod(-1), factors, pivots


@_decomposes(_aten._linalg_slogdet.default, table=EARLY)
def _linalg_slogdet(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sign of the determinant and the logarithm of its absolute value, with factors and pivots."""
    factors, pivots, sign, diagonal = _triangular(A)
    return sign * diagonal.sign().prod(-1), diagonal.abs().log().sum(-1), factors, pivots


def _triangular(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return factors, pivots, the sign of the permutation, and the diagonal of U."""
    factors, pivots, _ = _linalg_lu_factor_ex(A.mT if A.is_contiguous() else A)
    exchanged = pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)
    sign = (1 - 2 * (exchanged.to(torch.int64).sum(-1) % 2)).to(A.dtype)
    return factors, pivots, sign, factors.diagonal(0, -2, -1)


@_decomposes(_aten.linalg_cholesky_ex.default)
def _linalg_cholesky_ex(self: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Return L of L Lᵀ from the lower triangle, or its transpose from the upper one, and info."""

    def step(k: _Place, matrix: Tensor, row: Tensor) -> list[Tensor]:
        of_pivot = _at(matrix, -1, k)
        found = torch.where(row >= k, of_pivot / _at(of_pivot, -2, k).sqrt(), 0)
        return [matrix - found * found.mT, found.squeeze(-1)]

    _, columns = _repeated(step, self.shape[-1], self.mT if upper else self, (_rows(self),))
    lower = columns.movedim(0, -1)
    # NaN is not positive either.
    info = _first((lower.diagonal(0, -2, -1) > 0).logical_not())
    return (lower.mT if upper else lower), info


if hasattr(_aten, "cholesky"):  # until torch 2.13

    @_decomposes(_aten.cholesky.default)
    def _cholesky(self: Tensor, upper: bool = False) -> Tensor:
        return _linalg_cholesky_ex(self, upper=upper)[0]


@_decomposes(_aten.cholesky_solve.default)
def _cholesky_solve(self: Tensor, input2: Tensor, upper: bool = False) -> Tensor:
    """Return X of A X = ``self``, A the product of a triangular factor and its transpose."""
    lower, right = _broadcast(input2.mT if upper else input2, self)
    return _substituted(lower.mT, _substituted(lower, right, upper=False), upper=True)


@_decomposes(_aten.cholesky_inverse.default)
def _cholesky_inverse(self: Tensor, upper: bool = False) -> Tensor:
    """Return the inverse of the product of a triangular factor and its transpose."""
    return _cholesky_solve(_identity(self), self, upper)


@_decomposes(_aten.linalg_solve_triangular.default)
def _linalg_solve_triangular(
    self: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Return X of A X = B, or X A = B; the other triangle of A is not read."""
    if not left:
        return _linalg_solve_triangular(self.mT, B.mT, upper=not upper, unitriangular=unitriangular).mT
    return _substituted(*_broadcast(self, B), upper=upper, unit=unitriangular)


@_decomposes(_aten.triangular_solve.default)
def _triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    """Return X of A X = ``self``, or of the transpose of A, and A."""
    matrix = A.mT if transpose else A
    found = _linalg_solve_triangular(matrix, self, upper=upper != transpose, unitriangular=unitriangular)
    return found, _broadcast(A, self)[0].clone()


@_decomposes(_aten.linalg_qr.default)
def _linalg_qr(A: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Return Q ``[*, m, k]`` and R ``[*, k, n]``, k the smaller of m and n, or m if ``mode`` is complete."""
    count = min(A.shape[-2:])
    row, column = _rows(A), _columns(A)

    def step(k: _Place, both: Tensor, row: Tensor) -> list[Tensor]:
        reflected = _at(both, -1, k)
        first = _at(reflected, -2, k)
        rest = torch.where(row > k, reflected, 0)
        largest = torch.maximum(rest.abs().amax(-2, keepdim=True), first.abs())
        # The squares of scaled elements neither vanish nor overflow.
        scale = torch.where(largest == 0, 1, largest)
        length = scale * ((rest / scale).square().sum(-2, keepdim=True) + (first / scale).square()).sqrt()
        # A column that is zero below is kept, with its sign.
        is_zero = (rest == 0).all(-2, keepdim=True)
        signed = torch.where(first < 0, length, -length)
        apart = torch.where(is_zero, 1, first - signed)
        vector = torch.where(row == k, 1, rest / apart)
        factor = torch.where(is_zero, 0, -apart / torch.where(is_zero, 1, signed))
        return [both - factor * vector * (vector * both).sum(-2, keepdim=True)]

    # The reflections that turn A into R turn the identity into the transpose of Q.
    both, _ = _repeated(step, count, torch.cat([A, _identity(A, rows=True)], -1), (row,))
    wanted = A.shape[-2] if mode == "complete" else count
    across, rest = both.narrow(-1, 0, A.shape[-1]), both.narrow(-1, A.shape[-1], A.shape[-2])
    triangle = torch.where(row <= column, across, 0).narrow(-2, 0, wanted)
    return (A.new_zeros(0) if mode == "r" else rest.mT.narrow(-1, 0, wanted)), triangle


@_decomposes(_aten.linalg_householder_product.default)
def _linalg_householder_product(input: Tensor, tau: Tensor) -> Tensor:
    """Return the first columns of the product of reflections I - tau v vᵀ; v is 1 on the diagonal, 0 above."""
    ones = (_rows(input) == _columns(input)).to(input.dtype).expand(input.shape)
    return _reflected(input, tau, ones, backwards=True)


@_decomposes(_aten.ormqr.default)
def _ormqr(self: Tensor, input2: Tensor, input3: Tensor, left: bool = True, transpose: bool = False) -> Tensor:
    """Return Q C, or C Q; Q is the product of the reflections that ``self`` and ``input2`` hold, or its transpose."""
    if not left:
        return _ormqr(self, input2, input3.mT, transpose=not transpose).mT
    return _reflected(self, input2, input3, backwards=not transpose)


@_decomposes(_aten.linalg_matrix_exp.default)
def _linalg_matrix_exp(self: Tensor) -> Tensor:
    """Return the exponential: that of A / 2^s by its series, squared s times; NaN if s were above 32."""
    norm = self.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
    squarings = norm.log2().ceil().clamp_min(0)
    scaled, eye = self / squarings.exp2(), _identity(self)
    found = eye
    for degree in range(18, 0, -1):  # the norm is at most 1: the first omitted term is 1 / 19! = 8e-18
        found = eye + scaled.matmul(found) / degree

    def step(k: _Place, found: Tensor, squarings: Tensor) -> list[Tensor]:
        return [torch.where(squarings > k, found.matmul(found), found)]

    found, _ = _repeated(step, _SQUARINGS, found, (squarings,))
    return torch.where(squarings > _SQUARINGS, math.nan, found)


def _reflected(vectors: Tensor, tau: Tensor, matrix: Tensor, *, backwards: bool) -> Tensor:
    """Return a matrix that reflections are applied to, the last of them first if ``backwards``."""

    def step(k: _Place, matrix: Tensor, vectors: Tensor, tau: Tensor, row: Tensor) -> list[Tensor]:
        held = _at(vectors, -1, k)
        vector = torch.where(row > k, held, (row == k).to(held.dtype))
        return [matrix - _at(tau, -2, k) * vector * (vector * matrix).sum(-2, keepdim=True)]

    constants = (vectors, tau.unsqueeze(-1), _rows(vectors))
    return _repeated(step, tau.shape[-1], matrix, constants, backwards=backwards)[0]


def _substituted(triangle: Tensor, right: Tensor, *, upper: bool, unit: bool = False) -> Tensor:
    """Return the solution of a triangular system, one row at a time; the other triangle is not read."""
    row, column = _rows(triangle), _columns(triangle)
    others = torch.where(row < column if upper else row > column, triangle, 0)
    if not unit:
        diagonal = triangle.diagonal(0, -2, -1).unsqueeze(-1)
        others, right = others / diagonal, right / diagonal

    def step(k: _Place, found: Tensor, others: Tensor, right: Tensor, row: Tensor) -> list[Tensor]:
        return [torch.where(row == k, _at(right, -2, k) - _at(others, -2, k).matmul(found), found)]

    return _repeated(step, triangle.shape[-1], torch.zeros_like(right), (others, right, row), backwards=upper)[0]


def _repeated(
    step: Callable[..., list[Tensor]],
    count: int,
    carried: Tensor,
    constants: tuple[Tensor, ...],
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``carried`` after ``count`` steps, which may be symbolic, and the stack of their second results.

    The arguments of a step are its number, ``carried`` and the constants, its results ``carried``, of the same shape,
    and perhaps a second tensor.
    """
    if isinstance(count, int) and count <= _UNROLLED:
        results = []
        for k in reversed(range(count)) if backwards else range(count):
            carried, *more = step(k, carried, *constants)
            results += more
        return carried, torch.stack(results) if results else carried.new_zeros(0)
    places = torch.arange(count, device=carried.device).unsqueeze(-1)

    def body(carried: Tensor, place: Tensor, *constants: Tensor) -> list[Tensor]:
        return step(place, carried, *constants)

    found = scan(body, [carried.contiguous()], [places.flip(0) if backwards else places], constants)
    return found[0], found[1] if len(found) > 1 else carried.new_zeros(0)


def _at(tensor: Tensor, axis: int, place: _Place) -> Tensor:
    """Return one slice of a tensor, with the axis."""
    return tensor.narrow(axis, place, 1) if isinstance(place, int) else tensor.index_select(axis, place)


def _order(pivots: Tensor, rows: int) -> Tensor:
    """Return the number of each row before the exchanges, ``[*, rows]``."""
    places = torch.arange(rows, device=pivots.device)
    others = pivots.to(torch.int64) - 1

    def step(k: _Place, order: Tensor, others: Tensor, places: Tensor) -> list[Tensor]:
        other = _at(others, -1, k)
        order_there, order_here = order.gather(-1, other), _at(order, -1, k)
        return [torch.where(places == k, order_there, torch.where(places == other, order_here, order))]

    start = places.expand(*pivots.shape[:-1], rows)
    return _repeated(step, pivots.shape[-1], start, (others, places))[0]


def _first(failed: Tensor) -> Tensor:
    """Return the number of the first that is true, from 1; 0 if none is."""
    if failed.shape[-1] == 0:
        return failed.new_zeros(failed.shape[:-1], dtype=torch.int32)
    place = failed.to(torch.int32).argmax(-1) + 1
    return torch.where(failed.any(-1), place, 0).to(torch.int32)


def _broadcast(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
    return matrix.expand(*batch, *matrix.shape[-2:]), right.expand(*batch, *right.shape[-2:])


def _identity(matrix: Tensor, *, rows: bool = False) -> Tensor:
    """Return for each matrix of a batch the identity of the size of its columns, or rows."""
    size = matrix.shape[-2 if rows else -1]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return eye.expand(*matrix.shape[:-2], size, size)


def _rows(matrix: Tensor) -> Tensor:
    return torch.arange(matrix.shape[-2], device=matrix.device).unsqueeze(-1)


def _columns(matrix: Tensor) -> Tensor:
    return torch.arange(matrix.shape[-1], device=matrix.device)
