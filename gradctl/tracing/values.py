"""The values that one run of a program makes, and their adjoints, as sketches: none of them is kept.

Values are those of top-level torch calls, in order, and of the operators inside them; adjoints those of the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gradctl.numerics.sketch import Sketch, Sketcher
from gradctl.subject.torch_private import DisableTorchFunction
from gradctl.subject.tree import leaves
from gradctl.tracing.graph import CallSite, node_of
from gradctl.tracing.operators import OperatorMode
from gradctl.tracing.tracer import Apply, FunctionClass, Tracer


class Watched(Protocol):
    """The attributes of one value that a watch sets."""

    sketch: Sketch | None
    requires_grad: bool
    adjoint: Sketch | None
    leaf: str | None


class ValueWatch:
    """Sketches tensors as they are made, and their gradients; on leaving, its hooks are removed.

    ``leaves`` are names of leaves, by identity of their tensors.
    """

    def __init__(self, sketcher: Sketcher, leaves: Mapping[int, str]) -> None:
        self.sketcher, self.leaves = sketcher, leaves
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def see(self, value: Watched, tensor: Any) -> None:
        """Set the sketch of ``tensor``, and later that of its gradient; other values have no sketch."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            return
        value.sketch, value.requires_grad, value.adjoint = self.sketcher(tensor), _can_get_gradient(tensor), None
        value.leaf = self.leaves.get(id(tensor))
        if value.requires_grad:
            self.await_gradient(value, tensor)

    def await_gradient(self, value: Watched, tensor: Tensor) -> None:
        """Sketch the gradient that ``tensor`` will get."""

        def note(gradient: Tensor | None) -> None:  # None where no gradient reaches one of several outputs
            if gradient is not None and gradient.layout == torch.strided:
                value.adjoint = self.sketcher(gradient)

        self._handles.append(tensor.register_hook(note))  # type: ignore[no-untyped-call]


@dataclass(slots=True, eq=False)
class ProgramValue:
    """One value of a run."""

    sketch: Sketch | None = None
    origin: CallSite | None = None  # the call that made it; None for a leaf, and inside a call
    requires_grad: bool = False
    adjoint: Sketch | None = None  # of its gradient, if it has one
    leaf: str | None = None  # its name, if it is one
    takers: list[CallSite] = field(default_factory=list)  # the calls with it as an argument
    function: Any = None  # the custom ``autograd.Function`` that made it, if one did


class ProgramValues(Tracer):
    """Watch one run of a program and the backward after it."""

    def __init__(self, modules: Mapping[int, str], watch: ValueWatch) -> None:
        super().__init__(modules)
        self.watch = watch
        self.values: list[ProgramValue] = []  # arguments and results of top-level calls, in order
        self.inside: list[Sketch] = []  # of the results of operators inside of those calls
        self._known: Any = WeakTensorKeyDictionary()
        self._operators = _Operators(self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs in this context, custom Functions included."""
        with self.functions(), self:
            yield

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function; values of its ``forward`` have no adjoints of their own."""
        with self.body_hidden():
            return self._observe(function, lambda: apply(*args), args)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call and observe its arguments and results."""
        return self._observe(func, lambda: func(*args, **kwargs), (args, kwargs))

    def _observe(self, func: Any, make: Callable[[], Any], arguments: Any) -> Any:
        given = _tensors(arguments)
        self.see(given, None)
        with self._operators:
            result = make()
        if made := _tensors(result):
            origin = self.call_site(func)
            for tensor in given:
                self._known[tensor][0].takers.append(origin)
            self.see(made, origin)
        return result

    def see_outputs(self, outputs: Any) -> None:
        """Note the outputs of the program, which may come from a custom Function."""
        self.see(_tensors(outputs), None)

    def see(self, tensors: Iterable[Tensor], origin: CallSite | None) -> None:
        """Note tensors that are new, and watch the adjoints of those that require a gradient now."""
        with DisableTorchFunction():
            for tensor in tensors:
                node = node_of(tensor)
                value, version, before = self._known.get(tensor, (None, 0, None))
                if value is None or version != tensor._version:  # written to in place: another value
                    value = ProgramValue(origin=origin)
                    self.values.append(value)
                    self.watch.see(value, tensor)
                elif _can_get_gradient(tensor) and (node is not before or not value.requires_grad):
                    value.requires_grad = True  # a Function returns it
                    self.watch.await_gradient(value, tensor)
                self._known[tensor] = value, tensor._version, node
                value.function = getattr(node, "_forward_cls", None)


class _Operators(OperatorMode):
    """Note the results of each operator."""

    def __init__(self, values: ProgramValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.values.inside += [self.values.watch.sketcher(tensor) for tensor in _tensors(result)]
        return result


def _can_get_gradient(tensor: Tensor) -> bool:
    """Return whether a tensor can get a gradient: a view inside a Function's forward requires one, but has no hook."""
    return tensor.requires_grad and (tensor.grad_fn is not None or torch.is_grad_enabled())


def _tensors(value: Any) -> list[Tensor]:
    found = [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.layout == torch.strided and not tensor.is_quantized]
