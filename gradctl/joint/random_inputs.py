"""Random numbers of a model as inputs of its joint graph: the caller of the graph generates them.

An input has the name of the module that uses it, ``random.layers.0.dropout``, with a number if it uses several.
Numbers from the same state of the generator, as in the backward of a checkpoint, are the same input.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.joint.export_error import JointExportError, here
from gradctl.subject.signature import module_of
from gradctl.subject.torch_private import DisableTorchDispatch
from gradctl.tracing.graph import innermost_module, modules_by_identity
from gradctl.tracing.operators import OperatorMode, name_of, writes

_aten = torch.ops.aten

# The name of the distribution, and its parameters: numbers, or the name of a symbolic size.
Distribution = Mapping[str, int | float | str]

# The distribution of each operator, with the parameters that are not among its arguments.
_SAME_NAME = ("bernoulli", "cauchy", "exponential", "geometric", "normal", "uniform")
_DISTRIBUTIONS: dict[str, Distribution] = {
    **{name: {"distribution": name} for name in _SAME_NAME},
    "log_normal": {"distribution": "log-normal"},
    "rand": {"distribution": "uniform", "from": 0, "to": 1},
    "randint": {"distribution": "integers", "low": 0},
    "randn": {"distribution": "normal", "mean": 0, "std": 1},
    "randperm": {"distribution": "permutation"},
}
_PARAMETERS = ("p", "from", "to", "mean", "std", "lambd", "median", "sigma", "low", "high", "n")


@dataclass(frozen=True, slots=True, eq=False)
class RandomInput:
    """A tensor of random numbers, which one operator generates."""

    module: str  # the name of the module that calls the operator; empty for the model itself
    distribution: Distribution  # of each number, as torch parametrises it
    shape: Sequence[int | torch.SymInt]
    dtype: torch.dtype
    again: Callable[[], Tensor]  # generates as many by torch's generator, in the same order
    after: bytes  # the state of the generator afterwards


class RandomInputs(OperatorMode):
    """Record the random numbers that a model gets from torch's generator, or replace them by the ``given``, in order.

    Raises:
        JointExportError: no caller of the graph can generate these numbers; raised by the operator.
    """

    supports_higher_order_operators = True

    def __init__(self, model: Callable[..., Any], given: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = modules_by_identity(module_of(model))
        self._given, self._seen, self._expected = given, dict[bytes, RandomInput](), _state()
        self.found: list[RandomInput] = []  # in order, repeated ones once

    @property
    def by_name(self) -> dict[str, RandomInput]:
        """Return the random numbers by the names of their inputs, in their order."""
        count, number = Counter(draw.module for draw in self.found), Counter[str]()
        draws = {}
        for draw in self.found:
            parts = ("random", draw.module, str(number[draw.module]) if count[draw.module] > 1 else "")
            number[draw.module] += 1
            draws[".".join(part for part in parts if part)] = draw
        return draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; record or replace its random numbers."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        bound = _bound(func, args, kwargs)
        if bound.pop("generator", None) is not None:
            message = f"the forward draws from its own generator{here()}: use torch's, or draw outside."
            raise JointExportError(message)
        if func in _DECOMPOSED:
            return _DECOMPOSED[func](self._generate, **bound)
        return self._generate(func, args, kwargs)

    def _generate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the random numbers of an operator, or their replacement."""
        before, distribution = _state(), _distribution(func, args, kwargs)
        if distribution is None:
            value = func(*args, **kwargs)
            if _state() == before:  # attention without dropout, and the like
                return value
            raise JointExportError(
                f"{name_of(func)} draws random numbers by values that are computed{here()}: draw them outside, and "
                "give them as an input."
            )
        known = self._seen.get(before)
        if known is None and before != self._expected:
            raise JointExportError(f"the model sets the state of torch's random generator{here()}: draw outside.")
        number = self.found.index(known) if known is not None else len(self.found)
        value = func(*args, **kwargs) if self._given is None else self._replacement(self._given, number, func, args)
        if value.device.type != "cpu":
            raise JointExportError(f"random numbers are drawn on {value.device.type!r}{here()}: try --device cpu.")
        if known is None:
            if _state() == before:  # a fake tensor has no numbers
                torch.default_generator.manual_seed(_FIRST + number)
            again, module = _again(func, args, kwargs, value.dtype), innermost_module(self._modules) or ""
            known = RandomInput(module, distribution, value.shape, value.dtype, again, _state())
            self._seen[before] = known
            self.found.append(known)
        elif (known.distribution, *known.shape) != (distribution, *value.shape):
            raise JointExportError(f"other random numbers are drawn from the same state{here()}: draw them outside.")
        _set_state(known.after)
        self._expected = known.after
        return value

    def _replacement(self, given: Sequence[Tensor], number: int, func: Any, args: Any) -> Tensor:
        if number == len(given):
            raise JointExportError(
                f"the backward draws its own random numbers ({name_of(func)}): draw them in the forward."
            )
        return args[0].copy_(given[number]) if writes(func) else given[number].clone()


_FIRST = 2**32  # seeds that no user sets


def _dropout(generate: Callable[..., Any], input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Return the output and the mask of ``native_dropout``, as torch's CPU kernel computes them."""
    if train is False or p == 1:
        return _aten.native_dropout.default(input, p, train)  # type: ignore[no-any-return]
    mask = generate(_aten.bernoulli_.float, (torch.empty_like(input), 1 - p), {})
    return input * mask * (1 / (1 - p)), mask.bool()


def _normal(generate: Callable[..., Any], mean: Tensor | float, std: Tensor | float) -> Any:
    """Return normal numbers of which mean or standard deviation are tensors, as torch's kernel computes them."""
    of = [each for each in (mean, std) if isinstance(each, Tensor)]
    shape = torch.broadcast_shapes(*(each.shape for each in of))  # type: ignore[no-untyped-call]
    return generate(_aten.normal_.default, (of[0].new_empty(shape),), {}) * std + mean


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    _aten.native_dropout.default: _dropout,
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.normal.Tensor_Tensor: _normal,
}


@contextmanager
def forbid_other_generators() -> Iterator[None]:
    """Raise JointExportError on leaving if python's or numpy's generator was used: its numbers would be constants."""
    before = _other_states()
    yield
    for library, old, new in zip(("python", "numpy"), before, _other_states(), strict=True):
        if old != new:
            raise JointExportError(
                f"the forward draws random numbers from {library}'s generator: draw them with torch, or outside."
            )


def _other_states() -> tuple[Any, Any]:
    _, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (np.asarray(keys).tobytes(), *rest)


def _state() -> bytes:
    with DisableTorchDispatch():  # or a fake mode makes a fake tensor of it
        return bytes(torch.default_generator.get_state().numpy())


def _set_state(state: bytes) -> None:
    with DisableTorchDispatch():
        torch.default_generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _bound(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of an operator by name, with the defaults."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def _distribution(func: Any, args: Any, kwargs: Any) -> Distribution | None:
    """Return the distribution of an operator; None if it is unknown, or its parameters are computed values."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_like")
    if name not in _DISTRIBUTIONS or func is _aten.bernoulli.default:
        return None
    bound = _bound(func, args, kwargs)
    parameters = {key: bound[key] for key in _PARAMETERS if key in bound}
    if any(isinstance(value, Tensor) for value in parameters.values()):
        return None
    plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in parameters.items()}
    return {**_DISTRIBUTIONS[name], **plain}


def _again(func: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a call of an operator on tensors of the same layouts, which determine the order of the numbers."""
    makers = list(map(_maker, args))
    return lambda: func(*(make() for make in makers), **kwargs).to(dtype)


def _maker(value: Any) -> Callable[[], Any]:
    """Return a function that makes a tensor of the layout of ``value``, or returns it if it is no tensor."""
    if isinstance(value, Tensor):
        return partial(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype)
    return lambda: value
