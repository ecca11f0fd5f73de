"""Triton's interpreter, which runs kernels on the CPU: switched on before a target is imported, its dtypes promoted
with those of torch, and what it cannot do.

Nothing of triton is imported here: it takes a second, and reads its environment once. The names of the interpreter are
those of triton 3.7: ``InterpretedFunction.run``, the dtypes of ``InterpreterBuilder``, the messages of two errors.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.subject.torch_private import patched

VARIABLE = "TRITON_INTERPRET"
_ELSEWHERE = "Check it in float32, or on a GPU with --device cuda."


def switch_on_interpreter() -> None:
    """Set ``TRITON_INTERPRET=1`` if no GPU can run kernels, and triton can still read it."""
    is_open = VARIABLE not in os.environ and "triton" not in sys.modules
    if is_open and importlib.util.find_spec("triton") and not (torch.cuda.is_available() or torch.xpu.is_available()):
        os.environ[VARIABLE] = "1"


@contextmanager
def bfloat16_refused() -> Iterator[None]:
    """Raise an error in this context if the interpreter is to compute in bfloat16.

    It takes the bits of such numbers for integers, and says nothing: a kernel that is called on a bfloat16 tensor, or
    converts to bfloat16, is stopped.

    Raises:
        TargetError: GC127, exit code 4; if a kernel converts, inside what the interpreter raises.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    run = interpreter.InterpretedFunction.run

    def checked(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if any(getattr(each, "dtype", None) == torch.bfloat16 for each in (*args, *kwargs.values())):
            raise _in_bfloat16(f"kernel {kernel.__name__!r} takes a bfloat16 tensor")
        return run(kernel, *args, **kwargs)

    def converts(builder: Any) -> Any:
        raise _in_bfloat16("a Triton kernel converts to bfloat16")

    with (
        patched(interpreter.InterpretedFunction, "run", checked),
        patched(interpreter.InterpreterBuilder, "get_bf16_ty", converts),
    ):
        yield


@contextmanager
def kernels_in_float64() -> Iterator[None]:
    """Let the interpreter compute in float64 in this context, also what a kernel converts to a narrower float dtype.

    Only kernels all of whose float tensors are float64; the interpreter's own conversions are those of ``cast``.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    language, semantic, run = interpreter.tl, interpreter.TritonSemantic, interpreter.InterpretedFunction.run

    def widened(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            is_float = (isinstance(each, language.dtype) and each.scalar.is_floating() for each in args)
            return method(*(language.float64 if at else each for each, at in zip(args, is_float, strict=True)))

        return call

    def cast(self: Any, value: Any, dtype: Any, rounding: Any = None) -> Any:
        return of_triton["cast"](self, value, dtype)  # to float64 nothing is rounded

    of_triton = {name: getattr(semantic, name) for name in ("cast", "full", "dot")}
    replaced = {name: widened(method) for name, method in {**of_triton, "cast": cast}.items()}

    def promoted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        with ExitStack() as stack:
            if {each.dtype for each in tensors if each.is_floating_point()} == {torch.float64}:
                for name, method in replaced.items():
                    stack.enter_context(patched(semantic, name, method))
            return run(kernel, *args, **kwargs)

    with patched(interpreter.InterpretedFunction, "run", promoted):
        yield


def interpreter_refusal(error: BaseException) -> TargetError | None:
    """Return GC127 for what a kernel raises because of the interpreter; None for an error of the program itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TargetError) and cause.code == "GC127":
            return cause
        cause = cause.__cause__
    said = str(error)
    if type(error).__name__ == "InterpreterError" and "Expected dtype" in said:
        return _refusal(f"Triton's interpreter does not compute this in 16 bit: {said}", _ELSEWHERE)
    if "0 active drivers" in said:
        remedy = f"Set {VARIABLE}=1 in the environment: Triton's interpreter then runs the kernels on the CPU."
        return _refusal(f"a Triton kernel found no GPU, and {VARIABLE}=1 was not set when triton was imported", remedy)
    return None


def _in_bfloat16(what: str) -> TargetError:
    return _refusal(f"{what}: Triton's interpreter computes wrong numbers in bfloat16", _ELSEWHERE)


def _refusal(said: str, remedy: str) -> TargetError:
    return TargetError("GC127", f"{said}. {remedy}", exit_code=4)
