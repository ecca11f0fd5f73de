"""Operators of torch in a dispatch mode."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from gradctl.subject.torch_private import OpOverload


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
    """A dispatch mode that does not import Dynamo."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, imports all of Dynamo at the first operator (0.8 s) to keep it out of this very method.
        return False


def name_of(operator: Any) -> str:
    """Return ``aten.sort``, or ``aten.sort.stable`` for an overload with a name."""
    return str(operator).removesuffix(".default")


def writes(operator: Any) -> bool:
    """Return whether an operator writes to one of its arguments."""
    return isinstance(operator, OpOverload) and bool(operator._schema.is_mutable)
