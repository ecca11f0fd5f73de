"""The collectives that a rank calls, in order, with the module and the line that call them.

As in torch's ``CommDebugMode``, a dispatch mode sees them; also those of DDP's reducer, which calls them in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gradctl.subject.frames import user_location
from gradctl.tracing.operators import OperatorMode
from gradctl.tracing.tracer import tensors_in

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# They wait for a collective, or are part of one that is recorded.
_NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd", "monitored_barrier_")
# Operators of c10d have names of their own.
_NAMES = {"allreduce": "all_reduce", "allgather": "all_gather", "allgather_into_tensor": "all_gather_into_tensor"}
_REDUCTIONS = ("sum", "avg", "max", "min", "product")
Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of one rank.

    Attributes:
        name: as torch.distributed calls it: ``all_reduce``, ``reduce_scatter_tensor``.
        phase: of the step.
        module: the path of the module in whose forward it is called; empty if in none, or in backward.
        shape, dtype: of its first tensor.
        reduction: ``sum``, ``avg`` of a functional collective; empty if it reduces nothing, or that is not known.
        place: file and line of the user's code that calls it, if there is one on the stack.
    """

    name: str
    phase: Phase
    module: str
    shape: tuple[int, ...]
    dtype: str
    reduction: str
    place: tuple[str, int] | None


class CollectiveLog(OperatorMode):
    """Records the collectives of one rank.

    Args:
        model: whose modules are named.
        note: called with what the rank is doing, for the message if it does not end.
    """

    def __init__(self, model: Any, note: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Collective] = []
        self.phase: Phase = "forward"
        self._note = note
        self._names = {id(each): name for name, each in model.named_modules()} if isinstance(model, nn.Module) else {}
        self._inside: list[str] = []

    def watch_modules(self) -> ExitStack:
        """Follow which module runs, until the stack is closed."""

        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(self._names.get(id(module), ""))

        def leave(*_: Any) -> None:
            if self._inside:
                self._inside.pop()

        stack = ExitStack()
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        return stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and record it if it is a collective."""
        kwargs = kwargs or {}
        name = getattr(func, "_opname", "").rstrip("_")
        if getattr(func, "namespace", "") not in _NAMESPACES or name in _NO_COLLECTIVES:
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        first = tensors[0] if tensors else None
        module = next((each for each in reversed(self._inside) if each), "") if self.phase == "forward" else ""
        known = Collective(
            _NAMES.get(name, name),
            self.phase,
            module,
            tuple(first.shape) if isinstance(first, Tensor) else (),
            str(first.dtype).removeprefix("torch.") if isinstance(first, Tensor) else "",
            next((each for each in args if isinstance(each, str) and each in _REDUCTIONS), "")
            if func.namespace != "c10d"
            else "",
            user_location(),
        )
        self.found.append(known)
        self._note(f"waits in {known.name} (collective {len(self.found)}, in {known.phase})")
        return func(*args, **kwargs)
