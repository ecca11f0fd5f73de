"""Calls of operators that the user's program registers with ``torch.library`` or ``TORCH_LIBRARY``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradctl.subject.frames import user_location
from gradctl.subject.torch_private import OpOverload, registered_operators
from gradctl.tracing.operators import OperatorMode
from gradctl.tracing.tracer import SourceLine, map_nested, tensors_in

# Of torch 2.10 to 2.14 and of packages beside it; so are those that begin with an underscore.
_LIBRARIES = {
    *("aten", "c10d", "c10d_functional", "coor", "debug_mode_ops", "debugprims", "export", "fbgemm", "flex_lib"),
    *("fsdp", "inductor", "inductor_prims", "mempool", "mkl", "mkldnn", "mkldnn_prepacked", "onednn", "onnx"),
    *("onnx_symbolic", "prim"),
    *("prims", "profiler", "quantization", "quantized", "quantized_decomposed", "rngprims", "sparse"),
    *("static_runtime", "streams", "symm_mem", "torchao", "torchaudio", "torchvision", "transformers"),
}


@dataclass(frozen=True, slots=True, eq=False)
class OperatorCall:
    """One call; tensors among its arguments are copies, which require a gradient as they did."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: SourceLine | None  # of the caller

    @property
    def requires_grad(self) -> bool:
        """Whether a tensor among the arguments requires a gradient."""
        return any(tensor.requires_grad for tensor in tensors_in((self.args, self.kwargs)))


class OperatorCalls(OperatorMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that keeps one call of each operator, if possible one that is differentiated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: dict[Any, OperatorCall] = {}

    def __iter__(self) -> Iterator[OperatorCall]:
        return iter(self._calls.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; its arguments are copied first, because it may change them."""
        if isinstance(func, OpOverload) and is_users_operator(func.namespace):
            known = self._calls.get(func)
            if known is None or not known.requires_grad:
                copied_args, copied_kwargs = map_nested(_copied, (args, kwargs or {}))
                call = OperatorCall(func, copied_args, copied_kwargs, user_location())
                if known is None or call.requires_grad:
                    self._calls[func] = call
        return func(*args, **(kwargs or {}))


def has_users_operators() -> bool:
    """Return whether any operator that is registered in this process is the user's."""
    return any(map(is_users_operator, {name.partition("::")[0] for name in registered_operators()}))


def is_users_operator(namespace: str) -> bool:
    """Return whether a namespace is that of the user's operators: not torch's, nor that of a package of torch."""
    return namespace not in _LIBRARIES and not namespace.startswith("_")


def _copied(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
