"""Fourier transforms, against torch's own and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.fourier import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch

NORMS = ("backward", "ortho", "forward")


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pairs_of(found: Tensor) -> Tensor:
    return torch.view_as_real(found.resolve_conj())


@pytest.mark.parametrize(("dim", "norm"), list(itertools.product((0, 1, -1), NORMS)))
@pytest.mark.parametrize("n", [None, 4, 9])
def test_one_axis_is_transformed(dim: int, norm: str, n: int | None) -> None:
    x = values(5, 6, 7)
    forward = {"_fft_r2c"}
    assert_as_torch(TABLE, forward, lambda x: pairs_of(torch.fft.rfft(x, n, dim, norm)), x)
    assert_as_torch(TABLE, forward, lambda x: pairs_of(torch.fft.ihfft(x, n, dim, norm)), x)
    assert_as_torch(TABLE, forward, lambda x: pairs_of(torch.fft.fft(x, n, dim, norm)), x)
    pairs = values(5, 6, 7, 2)
    for inverse in (torch.fft.irfft, torch.fft.hfft):
        assert_as_torch(TABLE, {"_fft_c2r"}, lambda x: inverse(torch.view_as_complex(x), n, dim, norm), pairs)
    for whole in (torch.fft.fft, torch.fft.ifft):
        assert_as_torch(
            TABLE,
            {"_fft_c2c"},
            lambda x: pairs_of(whole(torch.view_as_complex(x), n, dim, norm)),
            pairs,
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [(0, 1), (2, 0), (0, 1, 2)])
def test_several_axes_are_transformed(norm: str, dims: tuple[int, ...]) -> None:
    x, pairs = values(4, 3, 5), values(4, 3, 5, 2)
    assert_as_torch(TABLE, {"_fft_r2c"}, lambda x: pairs_of(torch.fft.rfftn(x, None, dims, norm)), x)
    assert_as_torch(TABLE, {"_fft_c2r"}, lambda x: torch.fft.irfftn(torch.view_as_complex(x), None, dims, norm), pairs)
    assert_as_torch(
        TABLE,
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
    subject = Subject(target="test", model=model, args=(values(2, length).float(),))  # type: ignore[arg-type]
    unit = Comparing(subject, Allows(())).form("onnx-joint", named=True)
    assert (unit.verdict, unit.reason) == ("pass", None), unit.findings
