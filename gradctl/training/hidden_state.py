"""The state of a module by name, with what no ``state_dict`` has: attributes, random generators, caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradctl.numerics.measures import same_values

# Of every module; none of them is state of the user's.
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
_DEEPEST = 4


def attribute_names(module: nn.Module) -> list[str]:
    """Return the names of the attributes of a module that are no parameters or modules; its buffers are among them."""
    return [*(key for key in vars(module) if key not in _OF_TORCH), *module._buffers]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the value of each attribute and buffer of each module, by full name."""
    return {
        f"{name}.{key}".removeprefix("."): frozen(getattr(module, key))
        for name, module in model.named_modules()
        for key in attribute_names(module)
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ."""
    return [name for name in {**before, **after} if not is_same(before.get(name), after.get(name))]


def frozen(value: Any, depth: int = 0) -> Any:  # noqa: PLR0911  # a kind a line
    """Return a value as it is now, to compare it later; None for what cannot be compared."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.layout == torch.strided else None
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if depth == _DEEPEST:
        return None
    if isinstance(value, Mapping):
        keys = [key if isinstance(key, str | int) else number for number, key in enumerate(value)]
        return dict(zip(keys, (frozen(each, depth + 1) for each in value.values()), strict=True))
    if isinstance(value, list | tuple | set | deque):
        return [frozen(each, depth + 1) for each in value]
    return None


def is_same(one: Any, other: Any) -> bool:
    """Return whether two frozen values are the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and same_values(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(is_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)
