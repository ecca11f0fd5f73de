"""Random numbers in a run: which were drawn, and a run in which each is replaced by its mean.

A dropout mask has the shape of what it masks, so that micro-batches draw other masks than the batch: that is no error
of theirs, and hides every other difference. Without random numbers, both steps compute the same function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import listed
from gradctl.tracing.operators import OperatorMode, name_of
from gradctl.tracing.tracer import tensors_in

_aten = torch.ops.aten
# Operator and shape of one draw, the sum of its values times the roots of their positions (two masks with as many ones
# are told apart), and the numbers that it is called with (a probability).
Draw = tuple[str, tuple[int, ...], float, tuple[float, ...]]


class RecordedDraws(OperatorMode):
    """Record each use of torch's generator; numbers from the same state of it, as in a recomputation, once."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[bytes, Draw] = {}

    @property
    def draws(self) -> list[Draw]:
        """The draws in order."""
        return list(self._found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and record what it draws."""
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **(kwargs or {}))
        before = _state()
        result = func(*args, **(kwargs or {}))
        if _state() != before:
            drawn = tensors_in(result)[-1].detach()  # a fused dropout returns its mask last
            numbers = tuple(float(each) for each in args if isinstance(each, int | float))
            self._found.setdefault(before, (name_of(func), tuple(drawn.shape), _digest(drawn), numbers))
        return result


class MeansOfDraws(OperatorMode):
    """Replace the random numbers of common operators by their means: dropout is the identity then."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, or write the mean in place of what it draws."""
        mean = _MEANS.get(func)
        if mean is not None:
            return mean(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        value = _CONSTANTS.get(getattr(func, "overloadpacket", None))
        if value is not None:
            for tensor in tensors_in(result):
                tensor.fill_(value)
        return result


def describe_draws(plain: Sequence[Draw], own: Sequence[Draw]) -> str:
    """Return how the draws of a variant differ from those of the plain step, or nothing if they are the same."""
    if list(plain) == list(own):
        return ""
    if repeats(plain, own):
        return f"{_counted(own[len(plain) :])} after those of the plain step"
    if _counted(own) != _counted(plain):
        return f"{_counted(own)}, and the plain step {_counted(plain)}"
    return f"{_counted(own)}, as many as the plain step, with other values"


def repeats(plain: Sequence[Draw], own: Sequence[Draw]) -> bool:
    """Return whether a variant draws what the plain step draws, and more after it: a recomputation with other masks."""
    return len(own) > len(plain) and list(own[: len(plain)]) == list(plain)


def _counted(draws: Sequence[Draw]) -> str:
    """Return ``4 calls of aten.bernoulli_.float ([4, 8])``."""
    if not draws:
        return "draws nothing"
    count = Counter(name for name, *_ in draws)
    parts = []
    for name, times in count.items():
        shapes = dict.fromkeys(str(list(shape)) for each, shape, *_ in draws if each == name)
        parts.append(f"{times} {'call' if times == 1 else 'calls'} of {name} ({listed(list(shapes), 2)})")
    return "makes " + " and ".join(parts)


def _digest(drawn: Tensor) -> float:
    values = drawn.flatten().double()
    return float(values @ torch.arange(1, len(values) + 1, dtype=torch.float64).sqrt())


def _state() -> bytes:
    return torch.default_generator.get_state().numpy().tobytes()


def _mean_of_bernoulli(tensor: Tensor, p: Any = 0.5, generator: Any = None) -> Tensor:
    return tensor.copy_(p) if isinstance(p, Tensor) else tensor.fill_(p)


def _mean_of_dropout(tensor: Tensor, p: float, train: bool | None = None) -> tuple[Tensor, Tensor]:
    return tensor.clone(), torch.ones_like(tensor, dtype=torch.bool)


def _mean_of_normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
    return tensor.fill_(mean)


def _mean_of_uniform(tensor: Tensor, low: float = 0.0, high: float = 1.0, generator: Any = None) -> Tensor:
    return tensor.fill_((low + high) / 2)


_MEANS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli_.float: _mean_of_bernoulli,
    _aten.bernoulli_.Tensor: _mean_of_bernoulli,
    _aten.native_dropout.default: _mean_of_dropout,
    _aten.normal_.default: _mean_of_normal,
    _aten.uniform_.default: _mean_of_uniform,
}
# Of operators that return a new tensor.
_CONSTANTS: dict[Any, float] = {_aten.rand: 0.5, _aten.rand_like: 0.5, _aten.randn: 0.0, _aten.randn_like: 0.0}
