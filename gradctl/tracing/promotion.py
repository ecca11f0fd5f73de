"""The float64 oracle, through casts: a dispatch mode that turns each narrower float dtype of a program into
float64.

``model.double()`` alone is not enough: real models cast inside (Llama's RMSNorm goes through float32), and finite
differences over a float32 island resolve 1e-5 instead of 1e-11. Random operators keep the dtype they would have had, or
the stream would differ from that of the native run, and their results are cast.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradctl.subject.torch_private import DisableTorchFunction, OpOverload
from gradctl.tracing.operators import OperatorMode, writes
from gradctl.tracing.tracer import map_nested, tensors_in

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.float8_e4m3fn: torch.float64,
    torch.float8_e5m2: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_aten = torch.ops.aten


class Promotion(OperatorMode):
    """Run forwards and backward in float64; random numbers are ``native`` if the program names no dtype."""

    supports_higher_order_operators = True

    def __init__(self, native: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.native = native
        self.islands: dict[str, None] = {}  # names of operators without a float64 kernel, which ran in ``native``
        self.turned = False  # whether any operator ran in another way than without the mode; the caller resets it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator with its dtypes turned, unseen by function modes: TorchScript calls it from outside them."""
        with DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: PLR0911  # a case a line
        if not isinstance(func, OpOverload):  # a higher-order operator: its body escapes the mode
            self.islands[str(func)], self.turned = None, True
            return func(*args, **kwargs)
        if func is _aten.lift_fresh.default:  # torch.tensor(…, dtype=…) and torch.from_numpy arrive here, as leaves
            return self._widen(func(*args, **kwargs))
        if func is _aten.equal.default and isinstance(args[0], Tensor):  # so the state of the model is put back, too
            return func(*map_nested(_widen, args))
        replacement = _OF_NUMBERS.get(func) if args and not isinstance(args[0], Tensor) else _REPLACED.get(func)
        if replacement is not None:
            self.turned = True
            return replacement(*map_nested(_widen, args))
        if torch.Tag.nondeterministic_seeded in func.tags and not is_deterministic(func):
            self.turned = True
            return self._draw(func, args, kwargs)
        args, kwargs = map_nested(self._turn_dtype if writes(func) else self._turn, (args, kwargs))
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if not _refuses_double(error):
                raise
            self.islands[str(func)], self.turned = None, True
            return self._run_native(func, args, kwargs)

    def _turn(self, value: Any) -> Any:
        return self._turn_dtype(self._widen(value))

    def _turn_dtype(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in _WIDE:
            self.turned = True
            return _WIDE[value]
        return value

    def _widen(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _WIDE:
            self.turned = True
            return _widen(value)
        return value

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a random operator in the dtype it would have had, and cast its result."""
        if func is _aten.native_dropout.default:
            value, probability = args[0], args[1]
            _, mask = func(torch.ones_like(value, dtype=self.native), *args[1:], **kwargs)
            return value * mask * (0.0 if probability == 1 else 1 / (1 - probability)), mask
        if writes(func):
            target = args[0]
            if target.dtype != torch.float64:
                return func(*args, **kwargs)
            drawn = torch.empty_like(target, dtype=self.native)
            func(drawn, *args[1:], **kwargs)
            return target.copy_(drawn)
        has_floats = any(tensor.is_floating_point() for tensor in tensors_in((args, kwargs)))
        if not has_floats and kwargs.get("dtype") is None and _takes_dtype(func):
            drawn = func(*args, **{**kwargs, "dtype": self.native}) if _draws_floats(func) else func(*args, **kwargs)
            return map_nested(_widen, drawn)
        return self._run_native(func, args, kwargs)

    def _run_native(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator in the native dtype, and cast its result."""
        args, kwargs = map_nested(self._narrow, (args, kwargs))
        return map_nested(_widen, func(*args, **kwargs))

    def _narrow(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return value.to(self.native)
        return self.native if value is torch.float64 else value


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor | None = None, *_: Any) -> Tensor:
    """Return ``_grouped_mm(Tensor self, Tensor mat2, Tensor? offs=None, …)`` as products with a float64 kernel."""
    if ends is None:
        return torch.bmm(left, right)
    bounds = [0, *ends.tolist()]
    spans = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
    if left.dim() == 2 and right.dim() == 2:  # groups along the contracted dimension
        return torch.stack([left[:, span] @ right[span] for span in spans])
    if left.dim() == 3:  # groups along the columns of the right
        return torch.cat([left[i] @ right[:, span] for i, span in enumerate(spans)], dim=1)
    return torch.cat([left[span] @ right[i] for i, span in enumerate(spans)])


# TorchScript's optimiser calls these on its constants, which reach a dispatch mode as Python numbers.
_OF_NUMBERS: dict[Any, Callable[..., Any]] = {
    _aten.equal.default: operator.eq,
    _aten._local_scalar_dense.default: lambda value: value,
}

# torch.export's assertion of a dtype, which is another now; and operators without a float64 kernel on any device.
_REPLACED: dict[Any, Callable[..., Any]] = {_aten._assert_tensor_metadata.default: lambda *_: None}
if hasattr(_aten, "_grouped_mm"):
    _REPLACED[_aten._grouped_mm.default] = _grouped_mm


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widen(value: Any) -> Any:
    return value.to(_WIDE[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDE else value


def _takes_dtype(func: Any) -> bool:
    return any(argument.name == "dtype" for argument in func._schema.arguments)


def _draws_floats(func: Any) -> bool:
    """Return whether an operator generates floats of the default dtype, as randn, and not integers, as randint."""
    return not func.__name__.startswith(("randint", "randperm"))


def is_deterministic(func: Any) -> bool:
    """Return whether an operator generates no random numbers despite its tag: attention and recurrent kernels."""
    kinds = ("scaled_dot_product", "_efficient_attention", "_flash_attention", "rnn", "lstm", "gru")
    return any(kind in func._schema.name for kind in kinds)


def _refuses_double(error: Exception) -> bool:
    return any(words in str(error) for words in ("Double", "expected scalar type", "float64"))
