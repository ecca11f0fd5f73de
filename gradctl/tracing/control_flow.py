"""torch's operators of control flow (``cond``, ``map``, ``scan``, ``while_loop``) as branches and loops of Python.

Outside ``torch.compile`` they compile their functions, which rejects dispatch and function modes. The classes of the
operators are private to torch (2.10 to 2.14), as the two functions that compile and call them: those that exist are
replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gradctl.subject.torch_private import patched, tree_leaves, tree_map

_FOLDER = "torch._higher_order_ops"


@contextmanager
def plain_control_flow() -> Iterator[None]:
    """Let torch's operators of control flow call their functions from Python."""
    with ExitStack() as stack:

        def replace(holder: Any, name: str, value: Any) -> None:
            if holder is not None and name in vars(holder):
                stack.enter_context(patched(holder, name, value))

        replace(torch, "cond", _cond)
        for part in ("utils", *_OPERATORS):
            module = sys.modules.get(f"{_FOLDER}.{part}")
            replace(module, "_hop_compile_and_call", _call)
            replace(module, "_maybe_compile_and_run_fn", lambda function, *args: function(*args))
            if part in _OPERATORS:
                operator, plain = _OPERATORS[part]
                replace(getattr(module, operator, None), "__call__", _method(plain))
        yield


def _method(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: plain(*args, **kwargs)


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Any = None) -> Any:
    return function(*args, **(kwargs or {}))


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return (true_fn if pred else false_fn)(*operands)


def _map(f: Callable[..., Any], xs: Sequence[Any], pos_args: Sequence[Any]) -> Any:
    return _stacked([f(*(x[i] for x in xs), *pos_args) for i in range(len(xs[0]))])


def _scan(combine_fn: Callable[..., Any], init: Sequence[Any], xs: Sequence[Any], additional_inputs: Any = ()) -> Any:
    carry, carried, outs = None, list(init), []
    for i in range(len(xs[0])):
        carry, out = combine_fn(*carried, *(x[i] for x in xs), *additional_inputs)
        carried = tree_leaves(carry)
        outs.append(out)
    return carry, _stacked(outs)


def _while_loop(
    cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried_inputs: Any, additional_inputs: Any = (), **_: Any
) -> Any:
    values = carried_inputs
    while cond_fn(*tree_leaves(values), *additional_inputs):
        values = body_fn(*tree_leaves(values), *additional_inputs)
    return values


def _stacked(steps: Sequence[Any]) -> Any:
    return tree_map(lambda *values: torch.stack(values) if values[0] is not None else None, *steps)


# By the name of the file: the class of the operator there, and its equivalent in Python.
_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "cond": ("CondOp", _cond),
    "map": ("MapImpl", _map),
    "scan": ("ScanOp", _scan),
    "while_loop": ("WhileLoopOp", _while_loop),
}
