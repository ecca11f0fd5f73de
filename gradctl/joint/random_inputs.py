"""Random numbers of a model as inputs of its joint graph: the caller of the graph draws them.

An input has the name of the module that draws, ``random.layers.0.dropout``, with a number if it draws several times.
Numbers drawn again from the same state of the generator, as by a checkpoint in its backward, are the same input.
"""

from __future__ import annotations

import random
import sys
import traceback
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
from gradctl.tracing.operators import OperatorMode, name_of, writes

_aten = torch.ops.aten

# The name of the distribution, and its parameters: numbers, or the name of a symbolic size.
Distribution = Mapping[str, int | float | str]

# The distribution of each operator, with the parameters that are not among its arguments.
_DISTRIBUTIONS: dict[str, Distribution] = {
    "bernoulli": {"distribution": "bernoulli"},
    "cauchy": {"distribution": "cauchy"},
    "exponential": {"distribution": "exponential"},
    "geometric": {"distribution": "geometric"},
    "log_normal": {"distribution": "log-normal"},
    "normal": {"distribution": "normal"},
    "rand": {"distribution": "uniform", "from": 0, "to": 1},
    "randint": {"distribution": "integers", "low": 0},
    "randn": {"distribution": "normal", "mean": 0, "std": 1},
    "randperm": {"distribution": "permutation"},
    "uniform": {"distribution": "uniform"},
}
_PARAMETERS = ("p", "from", "to", "mean", "std", "lambd", "median", "sigma", "low", "high", "n")
_WITH_TENSOR_PARAMETERS = (_aten.normal.Tensor_float, _aten.normal.float_Tensor, _aten.normal.Tensor_Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class RandomInput:
    """A tensor of random numbers that one operator draws.

    Attributes:
        module: the name of the module that draws; empty for the model itself.
        distribution: of each number, as torch parametrises it.
        shape, dtype: of the tensor.
        again: draws as many from torch's generator, in the same order.
        after: the state of the generator afterwards.
    """

    module: str
    distribution: Distribution
    shape: Sequence[int | torch.SymInt]
    dtype: torch.dtype
    again: Callable[[], Tensor]
    after: bytes


class RandomInputs(OperatorMode):
    """Record the random numbers that a model draws from torch's generator, or replace them.

    Args:
        model: its modules have the names.
        given: the replacements, draw by draw; None keeps the model's own.

    Attributes:
        found: the draws in their order, repeated ones once.

    Raises:
        JointExportError: for a draw that no caller of the graph can make; raised by the operator that draws.
    """

    supports_higher_order_operators = True

    def __init__(self, model: Callable[..., Any], given: Sequence[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        module = module_of(model)
        modules = module.named_modules() if module is not None else ()
        self._modules: dict[int, str] = {id(each): name for name, each in modules}
        self._given, self._seen, self._expected = given, dict[bytes, RandomInput](), _state()
        self.found: list[RandomInput] = []

    @property
    def by_name(self) -> dict[str, RandomInput]:
        """Return the draws by the names of their inputs, in their order."""
        count, number = Counter(draw.module for draw in self.found), Counter[str]()
        draws = {}
        for draw in self.found:
            parts = ("random", draw.module, str(number[draw.module]) if count[draw.module] > 1 else "")
            number[draw.module] += 1
            draws[".".join(part for part in parts if part)] = draw
        return draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator; record or replace the random numbers that it draws."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        bound = _bound(func, args, kwargs)
        if bound.get("generator") is not None:
            message = f"the forward draws from a generator of its own{here()}: use torch's, or draw outside."
            raise JointExportError(message)
        if func is _aten.native_dropout.default:  # as torch's CPU kernel computes it
            value, p, train = bound["input"], bound["p"], bound["train"]
            if train is False or p == 1:
                return func(*args, **kwargs)
            mask = self._drawn(_aten.bernoulli_.float, (torch.empty_like(value), 1 - p), {})
            return value * mask * (1 / (1 - p)), mask.bool()
        if func in _WITH_TENSOR_PARAMETERS:  # as torch's kernel computes it
            of = [each for each in bound.values() if isinstance(each, Tensor)]
            shape = torch.broadcast_shapes(*(each.shape for each in of))  # type: ignore[no-untyped-call]
            blank = of[0].new_empty(shape)
            return self._drawn(_aten.normal_.default, (blank,), {}) * bound["std"] + bound["mean"]
        return self._drawn(func, args, kwargs)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
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
        if self._given is None:
            value = func(*args, **kwargs)
        elif number == len(self._given):
            raise JointExportError(
                f"the backward draws random numbers of its own ({name_of(func)}): draw them in the forward."
            )
        else:
            value = args[0].copy_(self._given[number]) if writes(func) else self._given[number].clone()
        if value.device.type != "cpu":
            raise JointExportError(f"random numbers are drawn on {value.device.type!r}{here()}: try --device cpu.")
        if known is None:
            if _state() == before:  # a fake tensor draws nothing
                torch.default_generator.manual_seed(_FIRST + number)
            again = _again(func, args, kwargs, value.dtype)
            known = RandomInput(self._module(), distribution, value.shape, value.dtype, again, _state())
            self._seen[before] = known
            self.found.append(known)
        elif (known.distribution, *known.shape) != (distribution, *value.shape):
            raise JointExportError(f"other random numbers are drawn from the same state{here()}: draw them outside.")
        _set_state(known.after)
        self._expected = known.after
        return value

    def _module(self) -> str:
        """Return the name of the innermost module whose method is running."""
        names = (
            self._modules.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_stack(sys._getframe())
        )
        return next((name for name in names if name is not None), "")


_FIRST = 2**32  # seeds that no user gives


@contextmanager
def preserve_generator() -> Iterator[None]:
    """Put torch's generator back on leaving."""
    before = _state()
    try:
        yield
    finally:
        _set_state(before)


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
    """Return the arguments of an operator by name, defaults too."""
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}


def _distribution(func: Any, args: Any, kwargs: Any) -> Distribution | None:
    """Return the distribution of an operator; None if it is unknown, or its parameters are computed values."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_").removesuffix("_like")
    if name not in _DISTRIBUTIONS or func in (_aten.bernoulli.default, *_WITH_TENSOR_PARAMETERS):
        return None
    bound = _bound(func, args, kwargs)
    parameters = {key: bound[key] for key in _PARAMETERS if key in bound}
    if any(isinstance(value, Tensor) for value in parameters.values()):
        return None
    plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in parameters.items()}
    return {**_DISTRIBUTIONS[name], **plain}


def _again(func: Any, args: Any, kwargs: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a call of an operator on tensors of the same layouts, which determine the order of the numbers."""
    makers: list[Callable[[], Any]] = [
        partial(torch.empty_strided, each.shape, each.stride(), dtype=each.dtype)
        if isinstance(each, Tensor)
        else partial(_identity, each)
        for each in args
    ]
    return lambda: func(*(make() for make in makers), **kwargs).to(dtype)


def _identity(value: Any) -> Any:
    return value
