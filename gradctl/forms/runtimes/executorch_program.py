"""Exported programs in ExecuTorch: lowered with its default settings, and run by its portable kernels on the CPU."""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, TensorArgument

from gradctl.core.errors import is_out_of_memory, listed
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.reasons import innermost, reason_of
from gradctl.forms.runtimes.package import import_package
from gradctl.forms.silence import silenced
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance

_FEW = 3  # operators that a message lists
_NOT_CORE = re.compile(r"Operator torch\._ops\.(\S+) is not in Core ATen")


class Method:
    """The forward of a program in the runtime; a call returns the tensors of its outputs.

    The runtime keeps the buffers that the program changes (``changed``, by name) from one call to the next. The program
    is loaded anew for the first call after ``calls`` is set to 0.
    """

    def __init__(self, load: Callable[[], Any], inputs: Sequence[tuple[bool, Any]], changed: Sequence[str]) -> None:
        self.calls, self.changed = 0, changed
        self._load, self._inputs = load, inputs
        self._loaded = load()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs for the tensors among the inputs, in order; other inputs have their values at capture."""
        if self.calls == 0 and self.changed:
            self._loaded = self._load()
        self.calls += 1
        given = iter(tensors)
        inputs = [next(given).detach().contiguous() if is_tensor else value for is_tensor, value in self._inputs]
        return [output.clone() for output in self._loaded.execute(inputs)]


def import_executorch() -> None:
    """Import the package, which takes seconds.

    Raises:
        CannotCapture: it is not installed, or cannot be imported.
    """
    with silenced():
        import_package("executorch.exir", "executorch")


def lower(program: torch.export.ExportedProgram) -> Method:
    """Return a program in ExecuTorch's runtime.

    Raises:
        CannotCapture: ExecuTorch rejects the program, or has no portable kernel for an operator.
    """
    exir, runtime = (importlib.import_module(f"executorch.{name}") for name in ("exir", "runtime"))
    given = [each.arg for each in program.graph_signature.input_specs if each.kind is InputKind.USER_INPUT]
    inputs = [(isinstance(each, TensorArgument), getattr(each, "value", None)) for each in given]
    try:
        with silenced(), torch.no_grad():
            edge = exir.to_edge(program)
            lowered = edge.to_executorch()
    except Exception as error:  # its passes may raise anything
        if is_out_of_memory(error):
            raise
        beyond = _NOT_CORE.search(str(error))
        said = f"operator {beyond[1]} is not in Core ATen" if beyond is not None else reason_of(innermost(error))
        said = f"the model is exported, and ExecuTorch refuses the program: {said}."
        raise CannotCapture(said, traceback.format_exc()) from error
    running = runtime.Runtime.get()
    known = running.operator_registry.operator_names
    operators = [each for plan in lowered.executorch_program.execution_plan for each in plan.operators]
    names = [f"{each.name}.{each.overload}" if each.overload else each.name for each in operators]
    if missing := [name for name in names if name not in known]:
        raise CannotCapture(f"ExecuTorch has no portable kernel for {listed(missing, _FEW)}.")
    content = lowered.buffer
    try:
        return Method(
            lambda: running.load_program(content).load_method("forward"),
            inputs,
            list(edge.exported_program().graph_signature.buffers_to_mutate.values()),
        )
    except Exception as error:
        raise CannotCapture(f"ExecuTorch cannot load the program: {first_line(error)}.") from error


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Raise: not every portable kernel computes float64 in float64.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture("not every kernel of ExecuTorch computes in float64; it is compared in the model's own dtype.")
