"""Complex numbers and Fourier transforms, against torch's own operators and autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, assert_right_in_onnxruntime, values
from tests.joint.joined import differing

aten = torch.ops.aten


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


X, Y, R = numbers(3, 4), numbers(3, 4, seed=1), reals(3, 4)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X, Y),
        (X, R),
        (R, X),
        (X, Y[0]),
        (X[:, :1], R),
        (X, numbers()),
        (X, reals()),
        (X.conj(), Y),
        (X, Y.to(torch.cfloat)),
    ],
)
def test_two_tensors_give_what_torch_gives(name: str, x: Tensor, y: Tensor) -> None:
    operator = getattr(aten, name).Tensor
    torch.testing.assert_close(TABLE[operator](x, y), operator(x, y))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize(("x", "y"), [(X, 2), (X, -0.5), (X, 1 + 2j), (R, 1 + 2j), (X, 3j)])
def test_a_tensor_and_a_number_give_what_torch_gives(name: str, x: Tensor, y: complex) -> None:
    operator = getattr(aten, name)
    for overload in (operator.Tensor, operator.Scalar):
        torch.testing.assert_close(TABLE[overload](x, y), overload(x, y))


@pytest.mark.parametrize("alpha", [2, -0.5, 1 + 2j])
def test_the_second_is_taken_times_alpha(alpha: complex) -> None:
    for operator in (aten.add.Tensor, aten.sub.Tensor):
        torch.testing.assert_close(TABLE[operator](X, Y, alpha=alpha), operator(X, Y, alpha=alpha))
        torch.testing.assert_close(TABLE[operator](X, R, alpha=alpha), operator(X, R, alpha=alpha))


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_a_quotient_of_large_and_of_small_numbers_is_one(size: float) -> None:
    torch.testing.assert_close(TABLE[aten.div.Tensor](X * size, Y * size), X / Y)


def test_functions_of_one_number_give_what_torch_gives() -> None:
    torch.testing.assert_close(TABLE[aten.exp.default](X), X.exp())
    torch.testing.assert_close(TABLE[aten.conj_physical.default](X), X.conj().resolve_conj())
    for exponent in (1, 2, 3.0, 8):
        torch.testing.assert_close(TABLE[aten.pow.Tensor_Scalar](X, exponent), X**exponent)
    assert TABLE[aten.pow.Tensor_Scalar](X, 0.5) is NotImplemented


def test_axes_and_places_are_those_of_torch() -> None:
    index = torch.tensor([2, 0, 2])
    for dim in (0, 1, -1):
        for name, arguments in (("unsqueeze", ()), ("select.int", (1,)), ("index_select", (index,)), ("cumsum", ())):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(aten, packet), overload or "default")
            torch.testing.assert_close(TABLE[operator](X, dim, *arguments), operator(X, dim, *arguments))
    torch.testing.assert_close(TABLE[aten.unsqueeze.default](X, 2), X.unsqueeze(2))
    torch.testing.assert_close(TABLE[aten.expand.default](X[:, :1], [2, -1, 5]), X[:, :1].expand(2, -1, 5))
    torch.testing.assert_close(
        TABLE[aten.constant_pad_nd.default](X, [1, -2, 0, 3]), aten.constant_pad_nd(X, [1, -2, 0, 3])
    )
    for indices in ([index], [None, index], [index, index]):
        torch.testing.assert_close(TABLE[aten.index.Tensor](X, indices), aten.index(X, indices))
        for accumulate in (False, True):
            written = aten.index_put(X, indices, Y[0, 0], accumulate)
            torch.testing.assert_close(TABLE[aten.index_put.default](X, indices, Y[0, 0], accumulate), written)


def test_choices_and_constants_are_those_of_torch() -> None:
    chosen = R > 0
    for x, y in ((X, Y), (X, R), (R, X), (X, Y[0])):
        torch.testing.assert_close(TABLE[aten.where.self](chosen, x, y), torch.where(chosen, x, y))
    torch.testing.assert_close(TABLE[aten.full.default]([2, 3], 1 + 2j), torch.full((2, 3), 1 + 2j))
    torch.testing.assert_close(TABLE[aten.full_like.default](X, 2), torch.full_like(X, 2))
    torch.testing.assert_close(TABLE[aten._to_copy.default](R, dtype=torch.cfloat), R.to(torch.cfloat))
    torch.testing.assert_close(TABLE[aten._to_copy.default](X, dtype=torch.cfloat), X.to(torch.cfloat))
    same = torch.where(chosen, X, Y)
    torch.testing.assert_close(TABLE[aten.eq.Tensor](X, same), same == X)
    torch.testing.assert_close(TABLE[aten.ne.Tensor](X, X.real + 0j), X.real != X)


def test_products_of_matrices_are_those_of_torch() -> None:
    torch.testing.assert_close(TABLE[aten.mm.default](X, Y.T), X @ Y.T)
    torch.testing.assert_close(
        TABLE[aten.bmm.default](numbers(2, 3, 4), numbers(2, 4, 5)), numbers(2, 3, 4) @ numbers(2, 4, 5)
    )


WINDOW = torch.hann_window(16)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator (Li et al. 2021, arXiv 2010.08895)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4, 4, 2, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.zeros(x.shape[0], 3, x.shape[2], x.shape[3] // 2 + 1, dtype=torch.cfloat)
        modes, weight = torch.fft.rfft2(x), torch.view_as_complex(self.weight)
        found[:, :, :4, :4] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :4, :4], weight)
        found[:, :, -4:, :4] = torch.einsum("bixy,ioxy->boxy", modes[:, :, -4:, :4], weight)
        return torch.fft.irfft2(found, s=x.shape[2:])


def spectrum(x: Tensor) -> Tensor:
    return torch.stft(x, 16, 4, window=WINDOW, return_complex=True)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(lambda x: spectrum(x).abs().pow(2).clamp_min(1e-5).log(), (2, 100), id="spectrogram"),
        pytest.param(lambda x: torch.view_as_real(torch.fft.ihfft2(x, (7, 4)).resolve_conj()), (3, 5, 6), id="ihfft"),
        pytest.param(lambda x: torch.view_as_real(torch.fft.fft2(x, (7, 4))), (3, 5, 6), id="padded"),
        pytest.param(lambda x: torch.istft(spectrum(x) * (0.5 + 0.25j), 16, 4, window=WINDOW), (2, 100), id="istft"),
        pytest.param(
            lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x).conj()), (3, 12), id="correlation"
        ),
        pytest.param(lambda x: torch.fft.fftshift(torch.fft.fft2(x)).angle().sin(), (2, 6, 7), id="phase"),
        pytest.param(lambda x: (torch.fft.rfft(x) / (torch.fft.rfft(x + 1) + 9 + 3j)).real, (2, 8), id="quotient"),
        pytest.param(lambda x: torch.fft.rfft(x)[:, [2, 0]].abs() + torch.fft.rfft(x)[:, 2:3].imag, (2, 8), id="index"),
        pytest.param(lambda x: (torch.exp(torch.complex(x / 9, x)) @ torch.polar(x.T, x.T)).real, (2, 3), id="polar"),
        pytest.param(
            lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones(4), torch.arange(4.0))),
            (3, 4, 2),
            id="rotary",
        ),
        pytest.param(Spectral(), (2, 2, 8, 12), id="neural-operator"),
    ],
)
def test_models_of_complex_numbers_are_right_in_onnxruntime(
    model: Callable[..., object], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(4)
    assert differing(model, torch.randn(shape)) == []


NORMS = ("backward", "ortho", "forward")


def pairs_of(found: Tensor) -> Tensor:
    return torch.view_as_real(found.resolve_conj())


@pytest.mark.parametrize(("dim", "norm"), list(itertools.product((0, 1, -1), NORMS)))
@pytest.mark.parametrize("n", [None, 4, 9])
def test_one_axis_is_transformed(dim: int, norm: str, n: int | None) -> None:
    x = values(5, 6, 7)
    forward = {"_fft_r2c"}
    assert_as_torch(forward, lambda x: pairs_of(torch.fft.rfft(x, n, dim, norm)), x)
    assert_as_torch(forward, lambda x: pairs_of(torch.fft.ihfft(x, n, dim, norm)), x)
    assert_as_torch(forward, lambda x: pairs_of(torch.fft.fft(x, n, dim, norm)), x)
    pairs = values(5, 6, 7, 2)
    for inverse in (torch.fft.irfft, torch.fft.hfft):
        assert_as_torch({"_fft_c2r"}, lambda x: inverse(torch.view_as_complex(x), n, dim, norm), pairs)
    for whole in (torch.fft.fft, torch.fft.ifft):
        assert_as_torch(
            {"_fft_c2c"},
            lambda x: pairs_of(whole(torch.view_as_complex(x), n, dim, norm)),
            pairs,
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [(0, 1), (2, 0), (0, 1, 2)])
def test_several_axes_are_transformed(norm: str, dims: tuple[int, ...]) -> None:
    x, pairs = values(4, 3, 5), values(4, 3, 5, 2)
    assert_as_torch({"_fft_r2c"}, lambda x: pairs_of(torch.fft.rfftn(x, None, dims, norm)), x)
    assert_as_torch({"_fft_c2r"}, lambda x: torch.fft.irfftn(torch.view_as_complex(x), None, dims, norm), pairs)
    assert_as_torch(
        {"_fft_c2c"},
        lambda x: pairs_of(torch.fft.ifftn(torch.view_as_complex(x), None, dims, norm)),
        pairs,
    )


def test_a_long_transform_is_left_to_onnx() -> None:
    for length in (1024, 1025):
        assert TABLE[torch.ops.aten._fft_r2c.default](values(1, length), [1], 0, True) is NotImplemented


# onnxruntime's own DFT is off by 1e-5 at 100 and 400, which a comparison does not let through.
@pytest.mark.parametrize(
    ("model", "length"),
    [
        pytest.param(lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x + 1)), 400, id="convolution"),
        pytest.param(lambda x: torch.fft.fft2(x).real, 100, id="mixing"),
        pytest.param(lambda x: torch.fft.rfft(x, norm="ortho").abs(), 1024, id="magnitude"),
    ],
)
def test_onnxruntime_transforms_to_the_last_digits(model: object, length: int) -> None:
    assert_right_in_onnxruntime(model, values(2, length).float())
