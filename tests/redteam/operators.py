"""Operators of torch on a tensor of shape [4, 6], right all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["BATCH", "OPERATORS", "WIDTH", "definite"]

BATCH = B = 4
WIDTH = D = 6


def _scattered(h: Tensor, reduce: str) -> Tensor:
    index = torch.arange(B * D).view(B, D) % 2
    return torch.zeros(2, D, dtype=h.dtype).scatter_reduce(0, index, h, reduce, include_self=False)


def definite(h: Tensor) -> Tensor:
    return h @ h.t() + torch.eye(h.shape[0], dtype=h.dtype)


def _interpolated(h: Tensor) -> Tensor:
    knots = torch.linspace(-3, 3, 7, dtype=h.dtype)
    values = knots.sin()
    right = torch.searchsorted(knots, h.detach().contiguous()).clamp(1, 6)
    share = (h - knots[right - 1]) / (knots[right] - knots[right - 1])
    return values[right - 1] * (1 - share) + values[right] * share


def _rows_changed(h: Tensor) -> Tensor:
    h = h.clone()
    h[0] = h[1] * 2
    h[2:].mul_(h[:2].clone().sin())
    return h


def _no_grad_norm(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h.norm() + 1


def _halved(h: Tensor) -> Tensor:
    while h.abs().max() > 0.1:
        h = h * 0.5 + 0.01 * h.sin()
    return h


OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "threshold": lambda h: F.threshold(h, 0.1, 0.0),
    "glu": F.glu,
    "softmax": lambda h: h.softmax(-1),
    "softmin": lambda h: F.softmin(h, -1),
    "log softmax": lambda h: h.log_softmax(0),
    "logsumexp": lambda h: h.logsumexp(-1),
    "abs": torch.abs,
    "sign times": lambda h: h.sign() * h,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p of square": lambda h: h.square().log1p(),
    "sqrt of square and one": lambda h: (h.square() + 1).sqrt(),
    "rsqrt": lambda h: (h.square() + 0.1).rsqrt(),
    "reciprocal": lambda h: (h.square() + 1).reciprocal(),
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda h: h.tanh().tan(),
    "asin": lambda h: (0.9 * h.tanh()).asin(),
    "acos": lambda h: (0.9 * h.tanh()).acos(),
    "atan2": lambda h: torch.atan2(h, h.roll(1, -1) + 3),
    "sinh": torch.sinh,
    "asinh": torch.asinh,
    "acosh": lambda h: (h.square() + 2).acosh(),
    "atanh": lambda h: (0.9 * h.tanh()).atanh(),
    "erf": torch.erf,
    "erfinv": lambda h: (0.9 * h.tanh()).erfinv(),
    "lgamma": lambda h: (h.square() + 1).lgamma(),
    "digamma": lambda h: (h.square() + 1).digamma(),
    "logit": lambda h: h.sigmoid().logit(1e-6),
    "i0e": torch.special.i0e,
    "sinc": torch.sinc,
    "xlogy": lambda h: torch.xlogy(h, h.square() + 1),
    "entropy": lambda h: torch.special.entr(h.sigmoid()),
    "logaddexp": lambda h: torch.logaddexp(h, h.flip(0)),
    "hypot": lambda h: torch.hypot(h, h.roll(1, 0)),
    "power 3": lambda h: h**3,
    "power 1.5": lambda h: h.abs() ** 1.5,
    "two to the": lambda h: 2**h,
    "fmod": lambda h: torch.fmod(h, 1.7),
    "remainder": lambda h: torch.remainder(h, 1.7),
    "floor times": lambda h: h - h.floor(),
    "round times": lambda h: h * h.round(),
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "clamp by tensor": lambda h: torch.clamp(h, min=h.mean()),
    "where": lambda h: torch.where(h > 0, h, h.square()),
    "masked fill": lambda h: h.masked_fill(h > 0.5, 0),
    "nan to num": torch.nan_to_num,
    "lerp": lambda h: torch.lerp(h, h.flip(0), h.sigmoid()),
    "addcmul": lambda h: torch.addcmul(h, h.flip(0), h.roll(1, -1), value=0.3),
    "addcdiv": lambda h: torch.addcdiv(h, h.flip(0), h.square() + 1),
    "sum": lambda h: h.sum(),
    "mean": lambda h: h.mean(0),
    "prod": lambda h: h.prod(-1),
    "var": lambda h: h.var(-1),
    "std": lambda h: h.std(0),
    "norm 1": lambda h: h.norm(1, -1),
    "norm 2": lambda h: h.norm(2, -1),
    "norm inf": lambda h: h.norm(torch.inf, -1),
    "norm 3": lambda h: h.norm(3, -1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "max": lambda h: h.max(),
    "max along": lambda h: h.max(-1).values,
    "min along": lambda h: h.min(0).values,
    "amax": lambda h: h.amax(-1),
    "aminmax": lambda h: torch.cat(torch.aminmax(h, dim=0)),
    "maximum": lambda h: torch.maximum(h, h.flip(0)),
    "minimum": lambda h: torch.minimum(h, h.flip(-1)),
    "median": lambda h: h.median(-1).values,
    "median of an even count": lambda h: h.quantile(0.5, -1),
    "quantile": lambda h: h.quantile(torch.tensor([0.1, 0.7], dtype=h.dtype), -1),
    "kthvalue": lambda h: h.kthvalue(2, -1).values,
    "mode": lambda h: h.mode(-1).values,
    "topk": lambda h: h.topk(2, -1).values,
    "sort": lambda h: h.sort(-1).values,
    "argsort and gather": lambda h: h.gather(-1, h.argsort(-1)),
    "msort": lambda h: h.msort(),
    "unique differences": lambda h: h.diff(dim=-1),
    "cumsum": lambda h: h.cumsum(-1),
    "cumprod": lambda h: h.cumprod(-1),
    "cummax": lambda h: h.cummax(-1).values,
    "cummin": lambda h: h.cummin(0).values,
    "logcumsumexp": lambda h: h.logcumsumexp(-1),
    "flip": lambda h: h.flip(0) * h,
    "roll": lambda h: h.roll(2, -1) * h,
    "repeat": lambda h: h.repeat(2, 1).sin(),
    "repeat interleave": lambda h: h.repeat_interleave(2, -1).sin(),
    "tile": lambda h: h.tile(2, 1) * 0.5,
    "expand": lambda h: h[None].expand(3, -1, -1).sin(),
    "unfold": lambda h: h.unfold(-1, 3, 1).sin(),
    "as strided": lambda h: h.contiguous().as_strided((3, 3), (2, 1)).sin(),
    "diagonal": lambda h: h.diagonal().sin(),
    "diag embed": lambda h: h.diag_embed().sin(),
    "tril": lambda h: h.tril().sin(),
    "triu": lambda h: h.triu(1) * h,
    "trace": lambda h: (h.t() @ h).trace(),
    "index select": lambda h: h.index_select(0, torch.tensor([0, 0, 2])),
    "gather": lambda h: h.gather(1, torch.tensor([[0, 1], [2, 2], [3, 0], [5, 5]])),
    "take along": lambda h: h.take_along_dim(h.argsort(0), 0),
    "index": lambda h: h[[0, 2], [1, 1]],
    "masked select": lambda h: h[h > 0].sum(),
    "index add": lambda h: torch.zeros(2, D, dtype=h.dtype).index_add(0, torch.tensor([0, 1, 1, 0]), h),
    "index put": lambda h: torch.zeros(3, D, dtype=h.dtype).index_put(
        (torch.tensor([0, 1, 1, 2]),), h, accumulate=True
    ),
    "index copy": lambda h: h.index_copy(0, torch.tensor([1]), h[:1] * 2),
    "scatter": lambda h: h.scatter(1, torch.tensor([[0, 1]]), h[:1, 2:4] * 2),
    "scatter add": lambda h: torch.zeros(2, D, dtype=h.dtype).scatter_add(0, (torch.arange(B * D).view(B, D) % 2), h),
    "scatter reduce mean": lambda h: _scattered(h, "mean"),
    "scatter reduce amax": lambda h: _scattered(h, "amax"),
    "scatter reduce prod": lambda h: _scattered(h, "prod"),
    "slice scatter": lambda h: h.slice_scatter(h[:, :2] * 3, 1, 2, 4),
    "select scatter": lambda h: h.select_scatter(h[0] * 2, 0, 1),
    "masked scatter": lambda h: h.masked_scatter(torch.eye(B, D, dtype=torch.bool), h.flip(0) * 2),
    "cat": lambda h: torch.cat([h, h * 2], -1),
    "stack": lambda h: torch.stack([h, h.sin()], 1),
    "split": lambda h: h.split([1, 5], -1)[1] * h.split([1, 5], -1)[0],
    "chunk": lambda h: h.chunk(3, -1)[1].sin(),
    "unbind": lambda h: h.unbind(0)[1] * h.unbind(0)[2],
    "pad": lambda h: F.pad(h, (1, 2), value=3.0).sin(),
    "pad reflect": lambda h: F.pad(h[None], (2, 2), "reflect").sin(),
    "pad circular": lambda h: F.pad(h[None], (2, 2), "circular").sin(),
    "pad replicate": lambda h: F.pad(h[None], (2, 2), "replicate").sin(),
    "matmul": lambda h: h @ h.t(),
    "bmm": lambda h: torch.bmm(h[None], h.t()[None]),
    "baddbmm": lambda h: torch.baddbmm(h @ h.t(), h[None], h.t()[None], beta=0.5),
    "addmm": lambda h: torch.addmm(h @ h.t(), h, h.t(), alpha=0.3),
    "einsum": lambda h: torch.einsum("bi,bj,bk->ijk", h, h.sin(), h.cos()),
    "outer": lambda h: torch.outer(h[0], h[1]),
    "kron": lambda h: torch.kron(h[:2], h[2:]),
    "cross": lambda h: torch.linalg.cross(h[:, :3], h[:, 3:]),
    "cdist": lambda h: torch.cdist(h, h.flip(0) + 2),
    "pdist": F.pdist,
    "tensordot": lambda h: torch.tensordot(h, h, dims=([0], [0])),
    "cosine similarity": lambda h: F.cosine_similarity(h, h.flip(0), dim=-1),
    "pairwise distance": lambda h: F.pairwise_distance(h, h.flip(0)),
    "inverse": lambda h: torch.linalg.inv(definite(h)),
    "solve": lambda h: torch.linalg.solve(definite(h), h),
    "cholesky": lambda h: torch.linalg.cholesky(definite(h)),
    "logdet": lambda h: torch.logdet(definite(h)),
    "slogdet": lambda h: torch.linalg.slogdet(definite(h)).logabsdet,
    "det": lambda h: torch.linalg.det(definite(h)),
    "eigvalsh": lambda h: torch.linalg.eigvalsh(definite(h)),
    "singular values": torch.linalg.svdvals,
    "qr": lambda h: torch.linalg.qr(h.t())[1].abs(),
    "pinv": torch.linalg.pinv,
    "matrix exp": lambda h: torch.linalg.matrix_exp(0.3 * h @ h.t()),
    "matrix power": lambda h: torch.linalg.matrix_power(0.3 * h @ h.t(), 3),
    "nuclear norm": lambda h: torch.linalg.matrix_norm(h, "nuc"),
    "triangular solve": lambda h: torch.linalg.solve_triangular(definite(h).tril(), h, upper=False),
    "lu": lambda h: torch.linalg.lu(definite(h))[2],
    "rfft": lambda h: torch.view_as_real(torch.fft.rfft(h)),
    "fft and back": lambda h: torch.fft.ifft(torch.fft.fft(h) * torch.arange(D)).real,
    "fft magnitude": lambda h: torch.fft.rfft(h).abs(),
    "fft2": lambda h: torch.view_as_real(torch.fft.fft2(h)),
    "irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) ** 2, n=D),
    "stft": lambda h: torch.stft(
        h.flatten(), 8, 4, window=torch.hann_window(8, dtype=h.dtype), return_complex=True
    ).abs(),
    "complex phase": lambda h: torch.polar(h.square() + 1, h).angle(),
    "complex product": lambda h: torch.view_as_real(torch.complex(h, h.flip(0)) * torch.complex(h.sin(), h)),
    "complex abs": lambda h: torch.complex(h, h + 1).abs(),
    "interpolate linear": lambda h: F.interpolate(h[None], scale_factor=2.0, mode="linear"),
    "interpolate nearest": lambda h: F.interpolate(h[None, None], size=(7, 3)),
    "interpolate bilinear": lambda h: F.interpolate(h[None, None], size=(7, 9), mode="bilinear", align_corners=True),
    "interpolate bicubic": lambda h: F.interpolate(h[None, None], size=(7, 9), mode="bicubic"),
    "interpolate area": lambda h: F.interpolate(h[None, None], size=(2, 3), mode="area"),
    "pixel shuffle": lambda h: F.pixel_shuffle(h.view(1, 4, 2, 3), 2).sin(),
    "grid sample": lambda h: F.grid_sample(
        h[None, None], 0.8 * h[:3, :4].reshape(1, 2, 3, 2).tanh(), align_corners=False
    ),
    "affine grid": lambda h: F.affine_grid(h[None, :2, :3], (1, 1, 3, 3), align_corners=True).sin(),
    "max pool": lambda h: F.max_pool1d(h[None], 2),
    "max pool with overlap": lambda h: F.max_pool2d(h[None, None], 3, 1, 1),
    "max unpool": lambda h: F.max_unpool1d(*F.max_pool1d(h[None], 2, return_indices=True), 2),
    "average pool": lambda h: F.avg_pool1d(h[None], 3, 1, 1, count_include_pad=False),
    "adaptive average pool": lambda h: F.adaptive_avg_pool1d(h[None], 4),
    "adaptive max pool": lambda h: F.adaptive_max_pool1d(h[None], 4),
    "lp pool": lambda h: F.lp_pool1d(h[None].abs() + 0.1, 2.0, 2),
    "fractional power mean": lambda h: (h.square() + 0.1).pow(0.3).mean(-1),
    "fold": lambda h: F.fold(h.view(1, 4, 6), (3, 4), (2, 2)),
    "unfold image": lambda h: F.unfold(h[None, None], 2).sin(),
    "bucketize and weigh": lambda h: h * torch.bucketize(h, torch.linspace(-1, 1, 5, dtype=h.dtype)),
    "one hot of argmax": lambda h: F.one_hot(h.argmax(-1), D) * h,
    "histogram, soft": lambda h: torch.exp(
        -((h.flatten()[:, None] - torch.linspace(-1, 1, 5, dtype=h.dtype)) ** 2)
    ).sum(0),
    "searchsorted and interpolate": _interpolated,
    "trapezoid": lambda h: torch.trapezoid(h.sin(), dx=0.1),
    "cov": torch.cov,
    "corrcoef": torch.corrcoef,
    "block diag": lambda h: torch.block_diag(h[:2], h[2:]).sin(),
    "cartesian": lambda h: torch.cartesian_prod(h[0], h[1]).prod(-1),
    "vander": lambda h: torch.linalg.vander(h[0], N=4),
    "renorm": lambda h: torch.renorm(h, 2, 0, 1.0),
    "dropout": lambda h: F.dropout(h, 0.5, True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "feature dropout": lambda h: F.dropout1d(h[None], 0.5, True),
    "rrelu in training": lambda h: F.rrelu(h, training=True),
    "gumbel softmax": F.gumbel_softmax,
    "gumbel softmax, hard": lambda h: F.gumbel_softmax(h, hard=True),
    "noise": lambda h: h + torch.randn_like(h) * h,
    "vmap": torch.func.vmap(lambda row: row.softmax(-1) @ row),
    "jacobian inside": torch.func.vmap(torch.func.jacrev(lambda row: row.sin().cumsum(-1))),
    "jvp inside": lambda h: torch.func.jvp(lambda h: h.sin(), (h,), (h.cos(),))[1],
    "func.grad inside": torch.func.grad(lambda h: h.sin().square().sum()),
    "checkpoint": lambda h: checkpoint(lambda h: h.sin().exp(), h, use_reentrant=False),
    "reentrant checkpoint": lambda h: checkpoint(lambda h: h.sin().exp(), h, use_reentrant=True),
    "in place chain": lambda h: h.clone().mul_(2).add_(1).tanh_(),
    "in place on rows": _rows_changed,
    "detach inside": lambda h: h * h.detach().exp() + h,
    "no_grad inside": lambda h: h / _no_grad_norm(h),
    "item inside": lambda h: h * (1 + h.abs().max().item()),
    "branch on a value": lambda h: h.sin() if h.sum() > 0 else h.cos(),
    "straight through": lambda h: h + (h.sign() - h).detach(),
    "while loop": _halved,
}
