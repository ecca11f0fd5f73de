"""A function that uses modules from around it, as a module that owns them: they are copied with it, and their
parameters are parameters like any other. ``lambda x: net(x).logits`` has the parameters of ``net``, as ``param:net.…``.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from gradctl.subject.reach import global_names
from gradctl.subject.signature import optimized_inner


def adopt_modules(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a module that computes what a Python function does; anything else, and one that uses none, as it is.

    Found are the modules that the function closes over, and those that it reads by a global name; not what stands in
    a list, a dictionary or another function.
    """
    if not isinstance(function, types.FunctionType):
        return function
    modules = dict(_used(function))
    return _Closure(function, modules) if modules else function


class _Closure(nn.Module):
    """A function whose modules are its own."""

    def __init__(self, function: types.FunctionType, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.training = any(module.training for module in modules.values())
        self.forward = self.function = _rebound(function, modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Closure:
        modules = {name: copy.deepcopy(child, memo) for name, child in self._modules.items() if child is not None}
        memo[id(self)] = copied = _Closure(self.function, modules)
        return copied


def _used(function: types.FunctionType) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a function uses, by the names of its variables."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    variables = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    read = {name: function.__globals__.get(name) for name in global_names(function.__code__)}
    for name, value in {**read, **variables}.items():
        if isinstance(value, nn.Module):
            yield name, optimized_inner(value)


def _rebound(function: types.FunctionType, modules: Mapping[str, nn.Module]) -> types.FunctionType:
    """Return the function with these modules in place of the variables of their names."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    closure = tuple(
        types.CellType(modules[name]) if name in modules else cell for name, cell in zip(names, cells, strict=True)
    )
    known = {name: module for name, module in modules.items() if name in function.__globals__ and name not in names}
    rebound = types.FunctionType(
        function.__code__, {**function.__globals__, **known}, function.__name__, function.__defaults__, closure
    )
    rebound.__kwdefaults__ = function.__kwdefaults__
    rebound.__annotations__ = function.__annotations__
    return rebound
