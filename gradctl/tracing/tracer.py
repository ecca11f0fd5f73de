"""The one place where a run of the user's program is watched: its torch calls and its custom Functions.

Whatever observes a run is a ``Tracer`` that overrides ``call``, ``apply``, or both. What is a step of the program is
decided here, once for all of them:

1. A call inside the ``forward`` of a custom Function is part of that application, if the observer hides the body.
2. A call inside a transform of torch.func (``vmap``, ``grad``) is one level of the transform.
3. A Function inside a transform is applied once; the Functions that torch makes of it, one for each level of the
   transform, are no applications.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
        """Make one torch call of the program, or what replaces it."""
        return func(*args, **kwargs)

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply one custom Function of the program, or what replaces it; ``is_in_transform`` tells where."""
        return apply(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call, and show it to ``call`` if it is a step of the program itself."""
        if self.hidden or is_in_transform():
            return func(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call_site(self, func: Any) -> CallSite:
        """Return where the program is, which calls ``func``."""
        return call_site(func, self.modules)

    @contextmanager
    def body_hidden(self) -> Iterator[None]:
        """Watch nothing for a while: what runs is the body of a Function."""
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    @contextmanager
    def functions(self) -> Iterator[None]:
        """Show the applications of custom Functions to ``apply``."""
        own: Any = vars(Function)["apply"]

        def single(cls: FunctionClass, *args: Any, **kwargs: Any) -> Any:
            applied = FunctionBase.__dict__["apply"].__get__(None, cls)
            if self.hidden or (APPLY_IS_PYTHON and is_in_transform()):  # which arrives in ``transformed``
                return applied(*args, **kwargs)
            return self.apply(cls, lambda *given: applied(*given, **kwargs), args)

        def transformed(cls: FunctionClass, *args: Any, **kwargs: Any) -> Any:
            applied = own.__get__(None, cls)
            if self.hidden or not is_in_transform():  # without a transform it arrives in ``single``
                return applied(*args, **kwargs)
            return self.apply(cls, lambda *given: applied(*given, **kwargs), args)

        with ExitStack() as stack:
            holder = SingleLevelFunction if APPLY_IS_PYTHON else Function
            stack.enter_context(patched(holder, "apply", classmethod(single)))
            if APPLY_IS_PYTHON:
                stack.enter_context(patched(Function, "apply", classmethod(transformed)))
            yield


def is_in_transform() -> bool:
    """Tell whether a transform of torch.func is running."""
    return peek_interpreter_stack() is not None


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dictionaries: what torch calls are given."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []
