"""Wrong gradients, planted in one parameter of a right model: forward and every other gradient stay as they were.

``plant(model, "fc1.weight", "sign")`` returns a copy of the model whose module ``fc1`` reads its ``weight`` through an
operator that returns the same values and passes a wrong gradient on. The parameter keeps its name. Two kinds:

1. ``GRADIENT_BUGS``: functions of the true gradient, for any parameter;
2. ``LINEAR_BUGS``: mistakes that need the layer's input, for weight and bias of an ``nn.Linear``.

The operator comes in three kinds:

- ``custom op``: a ``torch.library.custom_op`` with a wrong backward;
- ``function``: an ``autograd.Function`` named ``Planted``;
- ``native``: operators of torch alone, so that nothing but finite differences can tell. ``scatter`` with an index that
  occurs twice keeps the value written last and sends the gradient to both: writing L(w) and then w over it returns w
  with the gradient g + Lᵀg. ``NATIVE_BUGS`` has the L of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GRADIENT_BUGS", "LINEAR_BUGS", "NATIVE_BUGS", "Kind", "Planted", "plant"]

Kind = Literal["custom op", "function", "native"]


def _row(gradient: Tensor, factor: float) -> Tensor:
    """Return the gradient with its row of largest norm multiplied by ``factor``."""
    norms = gradient.reshape(len(gradient), -1).norm(dim=1)
    factors = torch.where(norms == norms.max(), factor, 1.0).to(gradient.dtype)
    return gradient * factors.reshape(-1, *[1] * (gradient.ndim - 1))


def _largest(gradient: Tensor, factor: float) -> Tensor:
    """Return the gradient with its largest element multiplied by ``factor``."""
    magnitude = gradient.abs()
    return torch.where(magnitude == magnitude.max(), factor * gradient, gradient)


# From the true gradient to the wrong one. All are off by at least 1e-3 of the gradient's norm.
GRADIENT_BUGS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "scale 1.001": lambda g: 1.001 * g,
    "scale 1.1": lambda g: 1.1 * g,
    "scale 2": lambda g: 2 * g,
    "sign": lambda g: -g,
    "zero": torch.zeros_like,
    "none": lambda g: None,
    "off by the batch size": lambda g: g / 4,
    "zeroed row": lambda g: _row(g, 0.0),
    "negated row": lambda g: _row(g, -1.0),
    "one element doubled": lambda g: _largest(g, 2.0),
    "transposed": lambda g: g.t(),
    "rows swapped": lambda g: g.flip(0),
    "off by one": lambda g: g.roll(1, dims=-1),
    "dropped broadcast sum": lambda g: g.mean(0, keepdim=True).expand_as(g),
    "only positive entries": lambda g: g.clamp(min=0),
    "clipped": lambda g: torch.minimum(g.abs(), g.abs().max() / 2) * g.sign(),
    "rounded to two digits": lambda g: (50 * g / g.abs().max()).round() * g.abs().max() / 50,
    "a constant added": lambda g: g + 0.1 * g.abs().mean(),
    "one is added": lambda g: g + 1,
}

# L(w) = B(w) - w for the transposed B of each wrong gradient that is linear.
NATIVE_BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale 1.001": lambda w: 0.001 * w,
    "scale 1.1": lambda w: 0.1 * w,
    "scale 2": lambda w: w,
    "sign": lambda w: -2 * w,
    "zero": lambda w: -w,
    "transposed": lambda w: w.t() - w,
    "rows swapped": lambda w: w.flip(0) - w,
    "off by one": lambda w: w.roll(-1, dims=-1) - w,
    "dropped broadcast sum": lambda w: w.mean(0, keepdim=True).expand_as(w) - w,
    "first row zeroed": lambda w: torch.cat([-w[:1], torch.zeros_like(w[1:])]),
    "first half negated": lambda w: torch.cat([-2 * w[: len(w) // 2], torch.zeros_like(w[len(w) // 2 :])]),
}

# (the parameter it spoils, from (input, weight, cotangent) to the wrong gradient), each 2-dimensional.
LINEAR_BUGS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "bias of the first sample only": ("bias", lambda x, w, g: g[0]),
    "mean over the batch": ("bias", lambda x, w, g: g.mean(0)),
    "last sample dropped": ("weight", lambda x, w, g: g[:-1].t() @ x[:-1]),
    "stale saved tensor": ("weight", lambda x, w, g: g.t() @ (1.1 * x)),
    "negative inputs forgotten": ("weight", lambda x, w, g: g.t() @ x.clamp(min=0)),
    "samples swapped": ("weight", lambda x, w, g: g.flip(0).t() @ x),
    "output in place of cotangent": ("weight", lambda x, w, g: F.linear(x, w).t() @ x),
}


@torch.library.custom_op("gradctl_tests::planted", mutates_args=())
def _planted(parameter: Tensor, bug: str) -> Tensor:
    return parameter.clone()


_planted.register_fake(lambda parameter, bug: torch.empty_like(parameter))
_planted.register_autograd(
    lambda ctx, gradient: (GRADIENT_BUGS[ctx.bug](gradient), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "bug", inputs[1]),
)


@torch.library.custom_op("gradctl_tests::planted_linear", mutates_args=())
def _planted_linear(x: Tensor, weight: Tensor, bias: Tensor, bug: str) -> Tensor:
    return F.linear(x, weight, bias)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.bug = inputs[3]


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    spoiled, wrong = LINEAR_BUGS[ctx.bug]
    right = {"weight": gradient.t() @ x, "bias": gradient.sum(0)}
    right[spoiled] = wrong(x, weight, gradient)
    return gradient @ weight, right["weight"], right["bias"], None


_planted_linear.register_fake(lambda x, weight, bias, bug: F.linear(x, weight, bias))
_planted_linear.register_autograd(_linear_backward, setup_context=_keep)


class Planted(torch.autograd.Function):
    """The identity with the gradient of ``GRADIENT_BUGS[bug]``."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, bug: str) -> Tensor:
        ctx.bug = bug
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return GRADIENT_BUGS[ctx.bug](gradient), None


def _overwritten(parameter: Tensor, bug: str) -> Tensor:
    flat = parameter.reshape(-1)
    index = torch.arange(flat.numel()).repeat(2)
    return flat.scatter(0, index, torch.cat([NATIVE_BUGS[bug](parameter).reshape(-1), flat])).view_as(parameter)


_OPERATORS: dict[Kind, Callable[[Tensor, str], Tensor]] = {
    "custom op": _planted,
    "function": Planted.apply,
    "native": _overwritten,
}


def plant(model: nn.Module, parameter: str, bug: str, kind: Kind = "custom op") -> nn.Module:
    """Return a copy of ``model`` in which the gradient of ``parameter`` is wrong by ``bug``; forward is bit-equal.

    The module that owns the parameter becomes an instance of a subclass whose attribute of that name passes the
    parameter through the operator; the parameter itself stays registered under its name.
    """
    model = copy.deepcopy(model)
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    assert name in module._parameters, f"{parameter} is no parameter"
    if bug in LINEAR_BUGS:
        assert type(module) is nn.Linear and LINEAR_BUGS[bug][0] == name and kind == "custom op"
        changed = {"forward": lambda self, x: _planted_linear(x, self.weight, self.bias, bug)}
    else:
        operator = _OPERATORS[kind]
        changed = {name: property(lambda self: operator(self._parameters[name], bug))}
    module.__class__ = type(type(module).__name__, (type(module),), changed)
    return model
