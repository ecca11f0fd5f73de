"""Linear algebra of matrices, against torch's own kernels (LAPACK) and autograd."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import linalg, nn

from gradctl.joint.decompositions import EARLY, TABLE
from tests.joint.decompositions.substituted import Substituting, assert_as_torch
from tests.joint.joined import differing
from tests.sweeps import sampled

EVERY = {**TABLE, **EARLY}
aten = torch.ops.aten


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def regular(*shape: int, seed: int = 0) -> torch.Tensor:
    """Matrices with singular values between about 0.5 and 2.5."""
    return drawn(*shape, seed=seed) / (2 * math.sqrt(shape[-1])) + 1.5 * torch.eye(shape[-1], dtype=torch.float64)


def positive(a: torch.Tensor) -> torch.Tensor:
    return a @ a.mT + torch.eye(a.shape[-1], dtype=a.dtype)


# Of a matrix.
UNARY = {
    "det": (linalg.det, "_linalg_det"),
    "det, laid out by columns": (lambda a: linalg.det(a.mT), "_linalg_det"),
    "det of an inverse": (lambda a: linalg.det(linalg.inv(a)), "_linalg_det linalg_inv_ex"),
    "slogdet": (lambda a: tuple(linalg.slogdet(a)), "_linalg_slogdet linalg_lu_solve"),
    "slogdet, laid out by columns": (lambda a: tuple(linalg.slogdet(a.mT)), "_linalg_slogdet linalg_lu_solve"),
    "logdet": (lambda a: torch.logdet(positive(a)), "_linalg_slogdet linalg_lu_solve"),
    "inv": (linalg.inv, "linalg_inv_ex _linalg_check_errors"),
    "power": (lambda a: linalg.matrix_power(a, -2), "linalg_inv_ex"),
    "cholesky": (lambda a: linalg.cholesky(positive(a)), "linalg_cholesky_ex linalg_solve_triangular"),
    "cholesky, upper": (lambda a: linalg.cholesky(positive(a), upper=True), "linalg_cholesky_ex"),
    "cholesky_inverse": (torch.cholesky_inverse, "cholesky_inverse"),
    "cholesky_inverse, upper": (lambda a: torch.cholesky_inverse(a, upper=True), "cholesky_inverse"),
    "lu": (lambda a: tuple(linalg.lu(a))[1:], "linalg_lu linalg_solve_triangular"),
    "lu_factor": (lambda a: linalg.lu_factor(a)[0], "linalg_lu_factor_ex lu_unpack linalg_solve_triangular"),
    "lu_unpack": (lambda a: torch.lu_unpack(*linalg.lu_factor(a))[1:], "lu_unpack"),
    "qr": (lambda a: tuple(linalg.qr(a)), "linalg_qr linalg_solve_triangular"),
    "exp": (linalg.matrix_exp, "linalg_matrix_exp"),
}
if hasattr(torch.ops.aten, "cholesky"):
    UNARY["torch.cholesky"] = (lambda a: torch.cholesky(positive(a)), "cholesky")

# Of a matrix and of what is solved for, or of tau in its first column.
BINARY = {
    "solve": (linalg.solve, "_linalg_solve_ex linalg_lu_solve"),
    "solve, right": (lambda a, b: linalg.solve(a, b.mT, left=False), "_linalg_solve_ex linalg_lu_solve"),
    "solve a vector": (lambda a, b: linalg.solve(a, b[..., 0]), "_linalg_solve_ex linalg_lu_solve"),
    "triangular": (lambda a, b: linalg.solve_triangular(a, b, upper=True), "linalg_solve_triangular"),
    "triangular, right": (
        lambda a, b: linalg.solve_triangular(a, b.mT, upper=False, left=False),
        "linalg_solve_triangular",
    ),
    "triangular, of ones": (
        lambda a, b: linalg.solve_triangular(a, b, upper=False, unitriangular=True),
        "linalg_solve_triangular",
    ),
    "torch.triangular_solve": (lambda a, b: torch.triangular_solve(b, a)[0], "triangular_solve"),
    "torch.triangular_solve, transposed": (
        lambda a, b: torch.triangular_solve(b, a, upper=False, transpose=True)[0],
        "triangular_solve",
    ),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, a), "cholesky_solve"),
    "cholesky_solve, upper": (lambda a, b: torch.cholesky_solve(b, a, upper=True), "cholesky_solve"),
    "lu_solve": (lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b), "linalg_lu_factor_ex linalg_lu_solve"),
    "lu_solve, adjoint": (
        lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b, adjoint=True),
        "linalg_lu_factor_ex linalg_lu_solve",
    ),
    "lu_solve, right": (
        lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b.mT, left=False),
        "linalg_lu_factor_ex linalg_lu_solve",
    ),
    "householder_product": (lambda a, b: linalg.householder_product(a, b[..., 0]), "linalg_householder_product"),
    "ormqr": (lambda a, b: torch.ormqr(a, b[..., 0], b), "ormqr"),
    "ormqr, right, transposed": (lambda a, b: torch.ormqr(a, b[..., 0], b.mT, left=False, transpose=True), "ormqr"),
}

# A step of each of five rows is in a Scan, of fewer a part of the graph.
SIZES = (1, 2, 4, 5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["one", "batch"])
@pytest.mark.parametrize("name", UNARY)
def test_a_function_of_a_matrix_has_the_gradient_of_torch(name, batch, size):
    function, used = UNARY[name]
    assert_as_torch(set(used.split()), function, regular(*batch, size, size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["one", "batch"])
@pytest.mark.parametrize("name", BINARY)
def test_what_is_solved_has_the_gradients_of_torch(name, batch, size):
    function, used = BINARY[name]
    assert_as_torch(set(used.split()), function, regular(*batch, size, size), drawn(*batch, size, 2, seed=1))


@pytest.mark.parametrize("name", ["solve", "triangular", "torch.triangular_solve", "cholesky_solve", "lu_solve"])
def test_batches_are_broadcast(name):
    assert_as_torch(set(), BINARY[name][0], regular(3, 1, 3, 3), drawn(2, 3, 2, seed=1))
    assert_as_torch(set(), BINARY[name][0], regular(3, 3), drawn(2, 3, 2, seed=1))


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (6, 3), (3, 7), (2, 7, 6)])
def test_factors_of_any_shape_are_those_of_torch(shape):
    a = drawn(*shape)
    for found, wanted in (
        (TABLE[aten.linalg_lu_factor_ex.default](a), linalg.lu_factor_ex(a)),
        (TABLE[aten.linalg_lu.default](a), linalg.lu(a)),
        *((TABLE[aten.linalg_qr.default](a, mode), linalg.qr(a, mode)) for mode in ("reduced", "complete", "r")),
    ):
        torch.testing.assert_close(found, tuple(wanted))


@pytest.mark.parametrize(
    "matrix",
    [
        [[0.0, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]],
        [[0.0, 1], [1, 0]],
        [[0.0, 2, 1], [0, 1, 4], [3, 0, 0]],
        [[1.0, 2, 3], [-1, 2, 0], [1, 1, 1]],  # all of one size
        [[1e-20, 1], [1, 1]],
        [[0.0, 0, 0], [0, 0, 1], [0, 2, 0]],  # singular from the first column on
        [[1.0, 1, 1], [1, 1, 1], [1, 1, 2]],
    ],
)
def test_rows_are_exchanged_as_lapack_does(matrix):
    a = torch.tensor(matrix, dtype=torch.float64)
    found, wanted = TABLE[aten.linalg_lu_factor_ex.default](a), linalg.lu_factor_ex(a)
    torch.testing.assert_close(found, tuple(wanted))
    determinant = EVERY[aten._linalg_det.default](a)[0]
    torch.testing.assert_close(determinant, linalg.det(a))
    torch.testing.assert_close(EVERY[aten._linalg_slogdet.default](a)[:2], tuple(linalg.slogdet(a)))


def test_a_singular_matrix_has_a_determinant_with_a_gradient():
    a = drawn(2, 4, 4)
    a[:, 3] = a[:, 1] - 2 * a[:, 0]
    a[1, 0] = 0
    assert_as_torch({"_linalg_det"}, linalg.det, a)


# The shapes of reflections: a column that is done, all zero, of either sign, and the last row, which has nothing below.
@pytest.mark.parametrize(
    "matrix",
    [
        [[-2.0]],
        [[3.0, 1], [0, -2]],
        [[-3.0, 1], [0, -2]],
        [[0.0, 1, 2], [0, 0, 3], [0, 0, 0]],
        [[0.0, 1], [-1, 0]],
        [[1e-200, 2e-200], [3e-200, 1.0]],
        [[1e200, 2e200], [3e200, 1.0]],
    ],
)
def test_reflections_have_the_signs_of_lapack(matrix):
    a = torch.tensor(matrix, dtype=torch.float64)
    torch.testing.assert_close(TABLE[aten.linalg_qr.default](a), tuple(linalg.qr(a)))


def test_the_other_triangle_is_not_looked_at():
    a, b = regular(3, 3), drawn(3, 2)
    hidden = torch.where(torch.ones(3, 3).tril() == 1, a, math.nan)
    solve = TABLE[aten.linalg_solve_triangular.default]
    torch.testing.assert_close(solve(hidden, b, upper=False), linalg.solve_triangular(a, b, upper=False))
    lower, _ = TABLE[aten.linalg_cholesky_ex.default](torch.where(hidden.isnan(), hidden, positive(a)))
    torch.testing.assert_close(lower, linalg.cholesky(positive(a)))


def test_what_eager_raises_for_is_no_number_and_info_says_where():
    singular = torch.stack([regular(3, 3), torch.ones(3, 3, dtype=torch.float64), torch.zeros(3, 3)])
    inverse, info = TABLE[aten.linalg_inv_ex.default](singular)
    assert info.tolist() == linalg.inv_ex(singular)[1].tolist() == [0, 2, 1]
    assert inverse.isfinite().all((-1, -2)).tolist() == [True, False, False]
    indefinite = torch.stack(
        [torch.eye(3), torch.diag(torch.tensor([1.0, 0, 1])), torch.diag(torch.tensor([1.0, 2, -1]))]
    )
    lower, info = TABLE[aten.linalg_cholesky_ex.default](indefinite)
    assert info.tolist() == linalg.cholesky_ex(indefinite)[1].tolist() == [0, 2, 3]
    assert lower.isfinite().all((-1, -2)).tolist() == [True, False, False]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.3, 1.0, 7.0, 40.0])
def test_the_exponential_of_any_norm(scale):
    a = scale * drawn(2, 4, 4)
    torch.testing.assert_close(TABLE[aten.linalg_matrix_exp.default](a), linalg.matrix_exp(a), rtol=1e-9, atol=0)
    skew = scale * (a - a.mT)  # whose exponential is a rotation
    rotation = TABLE[aten.linalg_matrix_exp.default](skew)
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), atol=1e-9, rtol=0
    )


def test_the_exponential_of_a_norm_that_takes_too_many_squarings_is_no_number():
    assert TABLE[aten.linalg_matrix_exp.default](torch.tensor([[-1e10]])).isnan().all()


def test_a_bilinear_form_has_the_gradients_of_torch():
    used = {"_trilinear"}
    assert_as_torch(used, torch.nn.functional.bilinear, drawn(5, 3), drawn(5, 4), drawn(6, 3, 4), drawn(6))


def test_complex_matrices_and_factors_without_exchanges_are_left_to_others():
    a = regular(2, 2).to(torch.complex128)
    of_reals = [each for each in EVERY.values() if hasattr(each, "__wrapped__")]
    assert len(of_reals) > 15
    for function in of_reals:
        assert function(a) is NotImplemented, function
    assert TABLE[aten.linalg_lu.default](regular(2, 2), pivot=False) is NotImplemented


def test_factors_that_a_solution_comes_with_are_of_the_matrix_itself():
    # Which of its factors torch keeps is its own affair, and what its backward counts on.
    for a in (drawn(3, 3), drawn(3, 3).mT):
        torch.testing.assert_close(aten._linalg_solve_ex(a, drawn(3, 1))[1], linalg.lu_factor(a)[0])


ILL = {**{name: UNARY[name] for name in ("det", "slogdet", "inv", "cholesky", "qr", "lu")}, "solve": BINARY["solve"]}


@pytest.mark.parametrize("size", [3, 4, 12])
@pytest.mark.parametrize("name", ILL)
def test_float32_is_about_as_good_as_lapacks_for_a_condition_of_a_thousand(name, size):
    left, _, right = linalg.svd(drawn(32, size, size))
    a = (left @ torch.diag(torch.logspace(0, -3, size, dtype=torch.float64)) @ right).float()
    b = drawn(32, size, 2, seed=1).float()
    function = ILL[name][0] if name in BINARY else lambda a, b: ILL[name][0](a)
    exact = results(function, a.double(), b.double())
    ours, lapacks = results(function, a, b, decomposed=True), results(function, a, b)
    for wanted, found, theirs in zip(exact, ours, lapacks, strict=True):
        norm = wanted.flatten(1).norm(dim=1)
        errors = [float(((each - wanted).flatten(1).norm(dim=1) / norm).mean()) for each in (found, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-7  # measured: 0.6 to 1.5 times


def results(function, a, b, decomposed=False):
    """Return outputs and gradients, a row for each matrix."""
    a, b = (each.clone().requires_grad_() for each in (a, b))
    with Substituting() if decomposed else nullcontext():
        found = function(a, b)
        found = found if isinstance(found, tuple) else (found,)
        cotangents = [drawn(*each.shape).to(each.dtype) for each in found]
        gradients = torch.autograd.grad(found, (a, b), cotangents, allow_unused=True)
    given = (*found, *(each for each in gradients if each is not None))
    return [each.detach().double().reshape(len(a), -1) for each in given]


class Gaussian(nn.Module):
    """The log-density of rows under a normal distribution, by the Cholesky factor of its covariance."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(drawn(size).float()), nn.Parameter(regular(size, size).float())

    def forward(self, x):
        lower = linalg.cholesky(positive(self.spread))
        whitened = linalg.solve_triangular(lower, (x - self.mean).mT, upper=False)
        return -whitened.square().sum(-2) / 2 - lower.diagonal(0, -2, -1).log().sum(-1)


class Mixing(nn.Module):
    """A least-squares layer, an inverse and an orthogonal matrix, of weights that need exchanges."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(regular(size, size).flip(0).float())

    def forward(self, x):
        orthogonal, triangle = linalg.qr(self.weight)
        solved = linalg.solve(self.weight, x.mT) + linalg.inv(self.weight) @ x.mT
        return solved, linalg.matrix_exp(orthogonal / 2) @ triangle, linalg.lu_factor(self.weight).LU


class Flow(nn.Module):
    """An invertible mixing of channels, its volume, and its inverse laid out by columns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(regular(size, size).flip(0).float())

    def forward(self, x):
        inverse = linalg.inv(self.weight)
        return x @ self.weight, linalg.slogdet(self.weight).logabsdet, linalg.det(inverse), linalg.det(inverse.mT)


@pytest.mark.parametrize(
    ("layer", "size"),
    sampled(product([Flow, Gaussian, Mixing], [3, 9]), always=[(Flow, 9), (Gaussian, 3)]),
)
def test_layers_are_right_in_onnxruntime(layer, size):
    assert differing(layer(size), drawn(2, 5, size).float()) == []
