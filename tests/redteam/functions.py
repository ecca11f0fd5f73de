"""Formulas as an ``autograd.Function`` whose backward is right, or wrong in one of many ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["BUGS", "FORMULAS", "STYLES", "WIDTH", "Bug", "Formula", "Operation", "bugs_of", "custom"]

WIDTH = 6

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Formula:
    """What maps ``x`` of shape [..., WIDTH], and weights, to a tensor of the same shape."""

    of: Callable[..., Tensor]
    weights: tuple[tuple[int, ...], ...] = ()
    is_elementwise: bool = False
    takes_complex: bool = False
    is_rectangular: bool = False  # asks for exactly two axes


VECTOR, SQUARE = (WIDTH,), (WIDTH, WIDTH)

FORMULAS: dict[str, Formula] = {
    "scale": Formula(lambda x, w: x * w, (VECTOR,), takes_complex=True),
    "shift": Formula(lambda x, b: 2 * x + b, (VECTOR,), takes_complex=True),
    "matmul": Formula(lambda x, w: x @ w, (SQUARE,), takes_complex=True),
    "linear": Formula(lambda x, w, b: x @ w.transpose(0, 1) + b, (SQUARE, VECTOR), takes_complex=True),
    "quadratic": Formula(lambda x, w: x * x.roll(1, -1) * w, (VECTOR,), takes_complex=True),
    "swish": Formula(lambda x: x * x.sigmoid(), is_elementwise=True),
    "sine": Formula(lambda x: (2 * x).sin(), is_elementwise=True, takes_complex=True),
    "cubic": Formula(lambda x: x + x**3 / 3, is_elementwise=True, takes_complex=True),
    "softplus": Formula(lambda x: x.exp().log1p(), is_elementwise=True),
    "rms_norm": Formula(lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w, (VECTOR,)),
    "layer_norm": Formula(lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b), (VECTOR, VECTOR)),
    "softmax": Formula(lambda x, w: x.softmax(-1) * w, (VECTOR,)),
    "log_softmax": Formula(lambda x: x.log_softmax(-1)),
    "gate": Formula(lambda x, w, b: (x * w).tanh() * (x + b).sigmoid(), (VECTOR, VECTOR)),
    "scan": Formula(lambda x, w: (x * w).cumsum(-1), (VECTOR,), takes_complex=True),
    "power": Formula(lambda x, w: F.softplus(x) ** w, (VECTOR,)),
    "unit": Formula(lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-3).sqrt()),
    "leaky": Formula(lambda x, w: torch.where(x > 0, x, x * w), (VECTOR,)),
    "clamp": Formula(lambda x, w: x.clamp(-1, 1) * w, (VECTOR,)),
    "maximum": Formula(torch.maximum, (VECTOR,)),
    "attend": Formula(lambda x, w: (x @ w @ x.transpose(0, 1)).softmax(-1) @ x, (SQUARE,), is_rectangular=True),
}


@dataclass(frozen=True)
class Bug:
    """What is wrong with a backward: a function of the right one.

    ``wrong`` takes the right gradients, the Function's inputs, its cotangent, and the right backward as a function of
    the cotangent. It returns what the wrong backward returns.
    """

    wrong: Callable[[Gradients, Sequence[Tensor], Tensor, Callable[[Tensor], Gradients]], Gradients]
    fits: Callable[[Formula], bool] = lambda formula: True


def _of(index: int, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Gradients]:
    """Return a bug that changes the gradient of one input: 0 is ``x``, 1 the first weight."""

    def wrong(gradients: Gradients, *_: Any) -> Gradients:
        changed = gradients[index]
        return [*gradients[:index], None if changed is None else change(changed), *gradients[index + 1 :]]

    return wrong


def _without_last(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(gradient.shape[-1]) < gradient.shape[-1] - 1) if gradient.dim() else 0 * gradient


def _without_first_row(gradient: Tensor) -> Tensor:
    keep = (torch.arange(gradient.shape[0]) > 0).to(gradient.dtype)
    return gradient * keep.reshape(-1, *[1] * (gradient.dim() - 1))


def _where_zero(gradients: Gradients, inputs: Sequence[Tensor], *_: Any) -> Gradients:
    first = gradients[0]
    return [None if first is None else first.masked_fill(inputs[0] == 0, 0), *gradients[1:]]


def _writes_cotangent(gradients: Gradients, _: Any, cotangent: Tensor, __: Any) -> Gradients:
    if not any(size > 1 and stride == 0 for size, stride in zip(cotangent.shape, cotangent.stride(), strict=True)):
        cotangent.zero_()
    return gradients


def _reads_memory(_: Any, __: Any, cotangent: Tensor, right: Callable[[Tensor], Gradients]) -> Gradients:
    if cotangent.is_contiguous() or cotangent.untyped_storage().nbytes() < cotangent.numel() * cotangent.itemsize:
        return right(cotangent)
    return right(torch.as_strided(cotangent, cotangent.shape, torch.empty(cotangent.shape).stride()))


def _has_weight(formula: Formula) -> bool:
    return bool(formula.weights)


def _has_vector(formula: Formula) -> bool:
    return formula.weights[:1] == (VECTOR,)


BUGS: dict[str, Bug] = {
    **{f"x times {factor:g}": Bug(_of(0, lambda g, f=factor: f * g)) for factor in (1.01, 1.1, 2, 0.5, -1, 0)},
    **{f"w times {f:g}": Bug(_of(1, lambda g, f=f: f * g), _has_weight) for f in (1.01, 1.1, 2, -1, 0)},
    "x is None": Bug(_of(0, lambda g: None)),
    "w is None": Bug(_of(1, lambda g: None), _has_weight),
    "x misses the last column": Bug(_of(0, _without_last)),
    "x misses the first row": Bug(_of(0, _without_first_row)),
    "w misses the last column": Bug(_of(1, _without_last), _has_weight),
    "w is summed over all": Bug(_of(1, lambda g: g.sum().expand(g.shape)), _has_vector),
    "w is averaged": Bug(_of(1, lambda g: g / 5), _has_weight),
    "w is transposed": Bug(_of(1, lambda g: g.transpose(0, 1)), lambda formula: formula.weights[:1] == (SQUARE,)),
    "w is reversed": Bug(_of(1, lambda g: g.flip(-1)), _has_vector),
    "forgets the cotangent": Bug(lambda g, i, cotangent, right: right(torch.ones_like(cotangent))),
    "clips its gradient": Bug(lambda g, *_: [each if each is None else each.clamp(-0.01, 0.01) for each in g]),
    "clips its cotangent": Bug(lambda g, i, cotangent, right: right(cotangent.clamp(-1e3, 1e3))),
    "takes the sign": Bug(lambda g, *_: [each if each is None else each.sign() for each in g]),
    "is wrong at zero": Bug(_where_zero),
    "writes to its cotangent": Bug(_writes_cotangent),
    "reads its cotangent's memory": Bug(_reads_memory),
    "uses the last call's input": Bug(lambda g, *_: g),  # custom() does it
}
_ANYWHERE = [name for name in BUGS if name not in (
    "is wrong at zero", "writes to its cotangent", "reads its cotangent's memory", "uses the last call's input",
    "clips its cotangent",
)]  # fmt: skip


def bugs_of(formula: Formula) -> list[str]:
    """Return the bugs that this formula can have and that show in any place; complex values have no sign or bound."""
    return [name for name in _ANYWHERE if BUGS[name].fits(formula)]


def custom(
    formula: Callable[..., Tensor], bug: str | None = None, name: str = "Custom", style: str = "plain"
) -> Callable[..., Tensor]:
    """Return what applies a new Function that computes ``formula``; its backward has the bug, or is right.

    ``style`` is one of ``STYLES``: how the Function is written.
    """

    def gradients_of(inputs: Sequence[Tensor], cotangent: Tensor, asked: Sequence[bool]) -> Gradients:
        def right(cotangent: Tensor) -> Gradients:
            if style == "transformed":  # torch.autograd.grad does not work inside torch.func
                return list(torch.func.vjp(formula, *inputs)[1](cotangent))
            keeps = torch.is_grad_enabled()
            with torch.enable_grad():
                # Aliases, or a weight that is also part of x (tied) would be one variable for autograd.grad.
                aliases = [each.view_as(each) for each in inputs]
                wanted = [alias for alias, needed in zip(aliases, asked, strict=True) if needed]
                found = torch.autograd.grad(formula(*aliases), wanted, cotangent, create_graph=keeps, allow_unused=True)
            left = list(found)
            return [left.pop(0) if needed else None for needed in asked]

        gradients = right(cotangent)
        return BUGS[bug].wrong(gradients, inputs, cotangent, right) if bug else gradients

    made = STYLES[style](formula, gradients_of, bug)
    made.__name__ = made.__qualname__ = name
    return made.called


def _plain(formula: Callable[..., Tensor], gradients_of: Callable[..., Gradients], bug: str | None) -> Any:
    class Custom(torch.autograd.Function):
        inputs: tuple[Tensor, ...] = ()

        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            if bug == "uses the last call's input":
                Custom.inputs = inputs
            return formula(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Any:
            inputs = ctx.saved_tensors
            if bug == "uses the last call's input":
                inputs = tuple(last.detach().requires_grad_(i.requires_grad) for last, i in zip(Custom.inputs, inputs))
            return tuple(gradients_of(inputs, cotangent, ctx.needs_input_grad))

        @classmethod
        def called(cls, *inputs: Tensor) -> Tensor:
            return cls.apply(*inputs)

    return Custom


def _kept_in_attributes(formula: Callable[..., Tensor], gradients_of: Callable[..., Gradients], _: Any) -> Any:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.kept = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
            return formula(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> Any:
            return tuple(gradients_of(ctx.kept, cotangent, ctx.needs_input_grad))

        @classmethod
        def called(cls, *inputs: Tensor) -> Tensor:
            return cls.apply(*inputs)

    return Custom


def _of_several_outputs(formula: Callable[..., Tensor], gradients_of: Callable[..., Gradients], _: Any) -> Any:
    """Return a Function of two differentiable outputs and one that is not, which asks for cotangents that are None."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, factor: float, *inputs: Tensor, key: str = "") -> tuple[Tensor, Tensor, Tensor]:
            ctx.save_for_backward(*inputs)
            ctx.factor = factor
            ctx.set_materialize_grads(False)
            value = formula(*inputs)
            positive = value.abs() > 0.5
            ctx.mark_non_differentiable(positive)
            return value, factor * value, positive

        @staticmethod
        def backward(ctx: Any, first: Tensor | None, second: Tensor | None, _: Any) -> Any:
            if first is None and second is None:
                return (None,) * (1 + len(ctx.saved_tensors))
            scaled = None if second is None else ctx.factor * second
            cotangent = scaled if first is None else first if scaled is None else first + scaled
            return None, *gradients_of(ctx.saved_tensors, cotangent, ctx.needs_input_grad[1:])

        @classmethod
        def called(cls, *inputs: Tensor) -> Tensor:
            value, scaled, _ = cls.apply(-0.5, *inputs)
            return value + scaled.tanh()

    return Custom


def _transformed(formula: Callable[..., Tensor], gradients_of: Callable[..., Gradients], _: Any) -> Any:
    """Return a Function that works inside torch.func."""

    class Custom(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> Tensor:
            return formula(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Any:
            return tuple(gradients_of(ctx.saved_tensors, cotangent, ()))

        @classmethod
        def called(cls, *inputs: Tensor) -> Tensor:
            return cls.apply(*inputs)

    return Custom


STYLES: dict[str, Callable[..., Any]] = {
    "plain": _plain,
    "kept in attributes": _kept_in_attributes,
    "several outputs": _of_several_outputs,
    "transformed": _transformed,
}


class Operation(nn.Module):
    """A formula with its weights. Two that are made with the same seed are equal but for the bug."""

    def __init__(
        self, formula: str, bug: str | None, *, dtype: torch.dtype | None = None, style: str = "plain", seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = FORMULAS[formula].weights
        # About one, so that a power of it is well-defined and a product with it does not vanish.
        weights = [
            torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.3).add(len(shape) == 1)
            for shape in shapes
        ]
        self.weights = nn.ParameterList([weight.to(dtype or torch.get_default_dtype()) for weight in weights])
        self.apply_function = custom(FORMULAS[formula].of, bug, formula.title().replace("_", ""), style)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_function(x, *self.weights)
