"""Right programs of plain torch operators, many at points where a careless check is alarmed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.redteam.nets import LAYERS, OF_TOKENS, Complex
from tests.redteam.operators import BATCH as B
from tests.redteam.operators import OPERATORS, definite
from tests.redteam.operators import WIDTH as D

__all__ = ["RIGHT"]

Built = tuple[Callable[..., Any], tuple[Any, ...]]
RIGHT: dict[str, Callable[[], Built]] = {}


class Fed(nn.Module):
    """``function(h, self)`` of what a linear layer makes of the input; ``children`` are submodules."""

    def __init__(self, function: Callable[[Tensor, Any], Any], children: dict[str, Any], width: int = D) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(width, width), function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x), self)


def fed(name: str, function: Callable[[Tensor, Any], Any], **children: Callable[[], Any]) -> None:
    """Add a program: a linear layer, then ``function(h, self)`` of its value, of shape [4, 6]."""
    RIGHT[name] = lambda: (Fed(function, {key: child() for key, child in children.items()}), (torch.randn(B, D),))


for _name, _operator in OPERATORS.items():
    fed(f"{_name} of a linear layer", lambda h, m, operator=_operator: operator(h))


# ---- the same at ties, kinks, edges, minima; on other layouts, dtypes and sizes ----


def _alone(operator: Callable[[Tensor], Any], x: Tensor) -> Built:
    return operator, (x,)


_AT_TIES = (
    "relu", "relu6", "leaky relu", "abs", "max", "max along", "min along", "amax", "aminmax", "maximum", "minimum",
    "median", "median of an even count", "quantile", "kthvalue", "topk", "sort", "msort", "cummax", "cummin", "norm 1",
    "norm inf", "clamp", "clamp by tensor", "max pool", "max pool with overlap", "adaptive max pool", "hardtanh",
    "hardsigmoid", "hardswish", "softshrink", "scatter reduce amax", "where", "elu", "celu", "selu", "logcumsumexp",
)  # fmt: skip
_POINTS: dict[str, Callable[[], Tensor]] = {
    "at 0": lambda: torch.zeros(B, D),
    "at equal values": lambda: torch.full((B, D), 0.7),
    "at ties in pairs": lambda: torch.randn(B, D // 2).repeat_interleave(2, -1),
}
for (_point, _x), _name in itertools.product(_POINTS.items(), _AT_TIES):
    RIGHT[f"{_name} {_point}"] = lambda x=_x, operator=OPERATORS[_name]: _alone(operator, x())

_AT_BOUNDS = {
    "clamp": (OPERATORS["clamp"], 0.5),
    "hardtanh": (F.hardtanh, 1.0),
    "relu6": (F.relu6, 6.0),
    "hardswish": (F.hardswish, 3.0),
    "hardsigmoid": (F.hardsigmoid, -3.0),
    "hardshrink": (F.hardshrink, 0.5),
    "softshrink": (F.softshrink, 0.5),
    "smooth l1": (lambda h: F.smooth_l1_loss(h, torch.zeros_like(h)), 1.0),
    "huber": (lambda h: F.huber_loss(h, torch.zeros_like(h)), 1.0),
    "threshold": (OPERATORS["threshold"], 0.1),
}
for _name, (_operator, _bound) in _AT_BOUNDS.items():
    if _name not in ("hardshrink", "threshold"):  # these jump there
        RIGHT[f"{_name} at its bound"] = lambda operator=_operator, bound=_bound: _alone(
            operator, torch.full((3,), bound)
        )

_NEAR_AN_EDGE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "log": (torch.log, 1e-6),
    "sqrt": (torch.sqrt, 1e-6),
    "logit": (torch.logit, 1 - 1e-6),
    "erfinv": (torch.erfinv, 1 - 1e-6),
    "acosh": (torch.acosh, 1 + 1e-6),
    "atanh": (torch.atanh, 1 - 1e-5),
    "asin": (torch.asin, 1 - 1e-5),
    "xlogy": (lambda x: torch.xlogy(x, x), 1e-6),
    "binary cross-entropy": (lambda x: F.binary_cross_entropy(x, torch.ones_like(x)), 1e-6),
    "reciprocal": (torch.reciprocal, 1e-4),
    "lgamma": (torch.lgamma, 1e-4),
    "log and a relu at 0": (lambda x: x.log() + (x - 1e-6).relu(), 1e-6),
}
for _name, (_operator, _edge) in _NEAR_AN_EDGE.items():
    RIGHT[f"{_name} near its edge"] = lambda operator=_operator, edge=_edge: _alone(operator, torch.full((3,), edge))

_EVERYWHERE = (
    "softmax", "gelu", "var", "matmul", "sort", "cumsum", "max along", "normalize", "rfft", "where", "pad", "index add",
    "einsum", "log softmax", "expand", "in place chain", "median", "interpolate linear",
)  # fmt: skip
for _name in _EVERYWHERE:
    _operator = OPERATORS[_name]
    RIGHT[f"{_name} of a transposed input"] = lambda operator=_operator: _alone(operator, torch.randn(D, B).t())
    RIGHT[f"{_name} of an expanded input"] = lambda operator=_operator: _alone(operator, torch.randn(1, D).expand(B, D))
    RIGHT[f"{_name} of a strided input"] = lambda operator=_operator: _alone(operator, torch.randn(B, 2 * D)[:, ::2])
    RIGHT[f"{_name} in float64"] = lambda operator=_operator: (
        Fed(lambda h, m, operator=operator: operator(h), {}).double(),
        (torch.randn(B, D).double(),),
    )
    RIGHT[f"{_name} in bfloat16"] = lambda operator=_operator: (
        Fed(lambda h, m, operator=operator: operator(h.float()), {}).bfloat16(),
        (torch.randn(B, D).bfloat16(),),
    )
    RIGHT[f"{_name} times 1e6"] = lambda operator=_operator: (
        Fed(lambda h, m, operator=operator: 1e6 * operator(h), {}),
        (torch.randn(B, D),),
    )
    RIGHT[f"{_name} times 1e-6"] = lambda operator=_operator: (
        Fed(lambda h, m, operator=operator: 1e-6 * operator(h), {}),
        (torch.randn(B, D),),
    )

# ---- losses; at their minimum too, where the gradient is zero or a kink ----

_TARGET = torch.linspace(-1, 1, B * D).view(B, D)
_CLASSES = torch.tensor([0, 2, 5, 1])
_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda h: F.mse_loss(h, _TARGET.to(h)),
    "l1": lambda h: F.l1_loss(h, _TARGET.to(h)),
    "smooth l1": lambda h: F.smooth_l1_loss(h, _TARGET.to(h)),
    "huber": lambda h: F.huber_loss(h, _TARGET.to(h)),
    "poisson": lambda h: F.poisson_nll_loss(h, _TARGET.to(h).exp()),
    "gaussian nll": lambda h: F.gaussian_nll_loss(h, _TARGET.to(h), h.square() + 0.1),
    "kl": lambda h: F.kl_div(h.log_softmax(-1), _TARGET.to(h).softmax(-1), reduction="batchmean"),
    "bce with logits": lambda h: F.binary_cross_entropy_with_logits(h, _TARGET.to(h).sigmoid()),
    "bce": lambda h: F.binary_cross_entropy(h.sigmoid(), _TARGET.to(h).sigmoid()),
    "cross-entropy": lambda h: F.cross_entropy(h, _CLASSES, label_smoothing=0.1, ignore_index=1),
    "nll": lambda h: F.nll_loss(h.log_softmax(-1), _CLASSES),
    "focal": lambda h: ((1 - h.softmax(-1)) ** 2 * h.log_softmax(-1)).mean(),
    "hinge": lambda h: F.multi_margin_loss(h, _CLASSES),
    "multilabel hinge": lambda h: F.multilabel_margin_loss(h, torch.tensor([[0, 3, -1, 1, 1, 1]] * B)),
    "multilabel soft": lambda h: F.multilabel_soft_margin_loss(h, (_TARGET > 0).to(h)),
    "soft margin": lambda h: F.soft_margin_loss(h, _TARGET.sign().to(h)),
    "cosine embedding": lambda h: F.cosine_embedding_loss(h, _TARGET.to(h), torch.tensor([1, -1, 1, -1])),
    "margin ranking": lambda h: F.margin_ranking_loss(h[0], h[1], torch.tensor([1, -1, 1, 1, -1, 1]), 0.1),
    "triplet": lambda h: F.triplet_margin_loss(h[:1], h[1:2], h[2:3]),
    "dice": lambda h: 1 - 2 * (h.sigmoid() * (_TARGET > 0)).sum() / (h.sigmoid().sum() + 3),
    "contrastive": lambda h: F.cross_entropy(
        F.normalize(h, dim=-1) @ F.normalize(h, dim=-1).t() / 0.1, torch.arange(B)
    ),
    "total variation": lambda h: h.diff(dim=0).abs().mean() + h.diff(dim=1).abs().mean(),
    "log cosh": lambda h: (h - _TARGET.to(h)).cosh().log().mean(),
    "wasserstein": lambda h: (h.sort(-1).values - _TARGET.to(h).sort(-1).values).abs().mean(),
    "pinball": lambda h: torch.maximum(0.3 * (h - _TARGET.to(h)), -0.7 * (h - _TARGET.to(h))).mean(),
    "entropy": lambda h: -(h.softmax(-1) * h.log_softmax(-1)).sum(-1).mean(),
    "orthogonality": lambda h: (h @ h.t() - torch.eye(B).to(h)).square().sum(),
}
for _name, _loss in _LOSSES.items():
    fed(f"{_name} loss", lambda h, m, loss=_loss: loss(h))
    RIGHT[f"{_name} loss of the target itself"] = lambda loss=_loss: _alone(loss, _TARGET.clone())

fed("distillation of oneself", lambda h, m: F.kl_div(h.log_softmax(-1), h.detach().softmax(-1), reduction="sum"))
_LABELS, _LENGTHS = torch.tensor([[1, 2], [3, 3]]), (torch.tensor([4, 4]), torch.tensor([2, 1]))
fed("ctc loss", lambda h, m: F.ctc_loss(h[:, None].log_softmax(-1).expand(B, 2, D), _LABELS, *_LENGTHS))

# ---- distributions ----

_POSITIVE = F.softplus
_DISTRIBUTIONS: dict[str, Callable[[Tensor], torch.distributions.Distribution]] = {
    "normal": lambda h: torch.distributions.Normal(h, _POSITIVE(h)),
    "log normal": lambda h: torch.distributions.LogNormal(h, _POSITIVE(h)),
    "laplace": lambda h: torch.distributions.Laplace(h, _POSITIVE(h)),
    "cauchy": lambda h: torch.distributions.Cauchy(h, _POSITIVE(h)),
    "gumbel": lambda h: torch.distributions.Gumbel(h, _POSITIVE(h)),
    "uniform": lambda h: torch.distributions.Uniform(h, h + _POSITIVE(h)),
    "exponential": lambda h: torch.distributions.Exponential(_POSITIVE(h)),
    "weibull": lambda h: torch.distributions.Weibull(_POSITIVE(h), _POSITIVE(h) + 1),
    "gamma": lambda h: torch.distributions.Gamma(_POSITIVE(h) + 0.5, _POSITIVE(h)),
    "beta": lambda h: torch.distributions.Beta(_POSITIVE(h) + 0.5, _POSITIVE(h.flip(0)) + 0.5),
    "dirichlet": lambda h: torch.distributions.Dirichlet(_POSITIVE(h) + 0.5),
    "student": lambda h: torch.distributions.StudentT(_POSITIVE(h) + 2, h, _POSITIVE(h)),
    "chi square": lambda h: torch.distributions.Chi2(_POSITIVE(h) + 1),
    "multivariate normal": lambda h: torch.distributions.MultivariateNormal(h[0, :4], definite(h)),
    "relaxed bernoulli": lambda h: torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=h),
    "relaxed categorical": lambda h: torch.distributions.RelaxedOneHotCategorical(torch.tensor(0.5), logits=h),
    "half normal": lambda h: torch.distributions.HalfNormal(_POSITIVE(h)),
    "kumaraswamy": lambda h: torch.distributions.Kumaraswamy(_POSITIVE(h) + 1, _POSITIVE(h) + 1),
}
for _name, _distribution in _DISTRIBUTIONS.items():
    fed(f"sample of {_name}", lambda h, m, of=_distribution: of(h).rsample())
    fed(f"density of {_name}", lambda h, m, of=_distribution: of(h).log_prob(of(h).sample()))
fed("elbo", lambda h, m: torch.distributions.kl_divergence(
    torch.distributions.Normal(h, _POSITIVE(h)), torch.distributions.Normal(torch.zeros(D).to(h), torch.ones(D).to(h))
))  # fmt: skip
fed("categorical policy", lambda h, m: torch.distributions.Categorical(logits=h).log_prob(_CLASSES))
fed("categorical entropy", lambda h, m: torch.distributions.Categorical(logits=h).entropy())
fed("bernoulli density", lambda h, m: torch.distributions.Bernoulli(logits=h).log_prob((_TARGET > 0).to(h)))
fed("mixture density", lambda h, m: torch.distributions.MixtureSameFamily(
    torch.distributions.Categorical(logits=h), torch.distributions.Normal(h.flip(0), _POSITIVE(h))
).log_prob(_TARGET[:, 0].to(h)))  # fmt: skip

# ---- layers and nets ----

for _name, (_layer, _shape) in LAYERS.items():
    RIGHT[_name] = lambda layer=_layer, shape=_shape: (layer(), (torch.randn(shape),))

_TOKENS = torch.tensor([[1, 2, 0, 5], [4, 4, 6, 0]])
for _name, _layer in OF_TOKENS.items():
    RIGHT[_name] = lambda layer=_layer: (layer(), (_TOKENS.clone(),))

# ---- inputs that are large, small, or far from zero ----

for _name, _offset, _spread in (
    ("unix timestamps", 1.7e9, 1e4),
    ("pressures in pascal", 1e5, 1e2),
    ("tiny inputs", 0.0, 1e-12),
    ("huge inputs", 0.0, 1e12),
    ("constant inputs", 3.0, 0.0),
):
    RIGHT[f"{_name}, standardised"] = lambda offset=_offset, spread=_spread: (
        lambda x: ((x - offset) / (spread or 1.0)).sin().sum(-1),
        (offset + spread * torch.randn(B, D),),
    )
RIGHT["features of many scales"] = lambda: (
    nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1)),
    (torch.randn(B, D) * 10.0 ** torch.arange(-3, 3),),
)
RIGHT["1e5 inputs"] = lambda: (nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1)), (torch.randn(20_000, D),))
RIGHT["1e5 parameters"] = lambda: (
    nn.Sequential(nn.Linear(D, 300), nn.Tanh(), nn.Linear(300, 300)),
    (torch.randn(B, D),),
)
RIGHT["no parameters"] = lambda: (lambda x, y: (x.t() @ y).softmax(-1), (torch.randn(B, D), torch.randn(B, 2)))
RIGHT["scalar input"] = lambda: (lambda x: x.sin() * x, (torch.tensor(0.7),))
RIGHT["empty rows"] = lambda: (nn.Linear(D, 2), (torch.randn(0, D),))
RIGHT["one element"] = lambda: (nn.Linear(1, 1), (torch.randn(1, 1),))
RIGHT["complex parameters"] = lambda: (Complex(), (torch.randn(B, D, dtype=torch.complex64),))
RIGHT["complex intermediate"] = lambda: (Fed(lambda h, m: torch.fft.fft(h).mul(1j).real, {}), (torch.randn(B, D),))
