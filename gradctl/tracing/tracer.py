"""The one tracer of a run of the user's program: its torch calls and its custom Functions.

Each observer of a run is a ``Tracer`` that overrides ``call``, ``apply``, or both. The steps of a program are defined
here, once for all of them:

1. A call inside the ``forward`` of a custom Function is part of that application, if the observer hides the body.
2. A call inside a transform of torch.func (``vmap``, ``grad``) is one level of the transform.
3. A Function inside a transform is applied once; the Functions that torch makes of it, one for each level of the
   transform, are no applications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from gradctl.subject.torch_private import FunctionBase, SingleLevelFunction, patched, peek_interpreter_stack
from gradctl.tracing.graph import CallSite, call_site

SourceLine = tuple[str, int]
FunctionClass = type[Function]
Apply = Callable[..., Any]

# Up to torch 2.13; then it is C, which starts the levels of a transform by itself.
APPLY_IS_PYTHON = isinstance(vars(Function)["apply"], classmethod)

REGISTER_HOOK = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


class Tracer(TorchFunctionMode):
    """Watch one run of a program: ``with tracer`` its torch calls, ``with tracer.functions()`` its custom Functions.

    ``modules`` are paths of the model's modules, by identity.
    """

    def __init__(self, modules: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.modules = modules or {}
        self.hidden = 0  # > 0 in a body that is not looked into

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one torch call of the program, or the one that replaces it."""
        return func(*args, **kwargs)

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply one custom Function of the program, or its replacement; ``is_in_transform`` is true in transforms."""
        return apply(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call, and show it to ``call`` if it is a step of the program itself."""
        if self.hidden or is_in_transform():
            return func(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call_site(self, func: Any) -> CallSite:
        """Return the place of the program's present call of ``func``."""
        return call_site(func, self.modules)

    @contextmanager
    def body_hidden(self) -> Iterator[None]:
        """Watch no call in this context, the body of a Function."""
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    @contextmanager
    def functions(self) -> Iterator[None]:
        """Show the applications of custom Functions to ``apply``."""

        def watch(holder: Any, original: Any, is_watched: Callable[[], bool]) -> AbstractContextManager[None]:
            def apply(cls: FunctionClass, *args: Any, **kwargs: Any) -> Any:
                applied = original.__get__(None, cls)
                if self.hidden or not is_watched():
                    return applied(*args, **kwargs)
                return self.apply(cls, lambda *values: applied(*values, **kwargs), args)

            return patched(holder, "apply", classmethod(apply))

        single: Any = vars(FunctionBase)["apply"]
        if not APPLY_IS_PYTHON:
            with watch(Function, single, lambda: True):
                yield
            return
        # Function.apply calls that of SingleLevelFunction if no transform is running; else the latter is one level.
        with (
            watch(Function, vars(Function)["apply"], is_in_transform),
            watch(SingleLevelFunction, single, lambda: not is_in_transform()),
        ):
            yield


def is_in_transform() -> bool:
    """Return whether a transform of torch.func is running."""
    return peek_interpreter_stack() is not None


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to each item of its tuples, lists and dictionaries."""
    if isinstance(value, dict):
        return {key: map_nested(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [map_nested(function, item) for item in value]
    if isinstance(value, tuple):
        mapped = [map_nested(function, item) for item in value]
        if hasattr(value, "_make"):  # a named tuple
            return value._make(mapped)
        # torch.return_types (a structseq) is made from one sequence; another subclass need not be, and is a tuple then.
        return type(value)(mapped) if hasattr(value, "n_fields") else tuple(mapped)
    return function(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dictionaries, such as the arguments of torch calls."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []
