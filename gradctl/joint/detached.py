"""The values that a program detaches, marked in the trace of its forward.

Autograd detaches values that it saves, too, so ``detach`` alone does not show what the program treats as a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradctl.subject.torch_private import peek_interpreter_stack
from gradctl.tracing.recording import is_float_without_gradient, requiring_grad
from gradctl.tracing.tracer import map_nested

CONSTANT = torch.ops.aten.detach_copy.default  # not an operator of traced programs


class DetachedValues(TorchFunctionMode):
    """Mark the result of each call whose argument requires a gradient, and whose float result does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function of torch."""
        result = func(*args, **(kwargs or {}))
        if peek_interpreter_stack() is not None or not is_float_without_gradient(result):
            return result
        return map_nested(_mark, result) if requiring_grad((args, kwargs)) else result


def _mark(value: Any) -> Any:
    return CONSTANT(value) if isinstance(value, Tensor) else value
