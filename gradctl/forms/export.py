"""``torch.export``: one graph of aten operators with its parameters, run eagerly by its own module."""

from __future__ import annotations

import traceback
from collections import Counter
from time import perf_counter
from typing import Any

import torch
from torch import nn

from gradctl.forms.form import CannotCapture, Captured
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance

__all__ = ["capture", "of_exported_program", "widened"]


class _Wrapped(nn.Module):
    """A plain function as the module that torch.export wants."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


def capture(instance: Instance) -> Captured:
    """Return the model exported on its own inputs (non-strict).

    Raises:
        CannotCapture: torch.export refuses the model.
    """
    args, kwargs = instance.inputs()
    instance.restore()
    module = instance.model if isinstance(instance.model, nn.Module) else _Wrapped(instance.model)
    start = perf_counter()
    try:
        program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # the exporter or the user's model may raise anything
        raise CannotCapture(f"torch.export refuses the model: {first_line(error)}", traceback.format_exc()) from error
    return of_exported_program(program, perf_counter() - start)


def of_exported_program(program: torch.export.ExportedProgram, seconds: float = 0.0) -> Captured:
    """Return an exported program, just captured or loaded from a file, as a form."""
    # Its guards would refuse another dtype or batch size; whether those matter is for the comparison to say.
    module = program.module(check_guards=False)
    return Captured(
        "export",
        module,
        dict(module.named_parameters(remove_duplicate=False)),
        dict(module.named_buffers(remove_duplicate=False)),
        seconds,
        operators=_operators(program),
        artifact=program,
    )


def widened(captured: Captured, instance: Instance) -> Captured:
    """Return the same module with float64 parameters and buffers, to be run under the promotion (in place)."""
    module = captured.call
    assert isinstance(module, nn.Module)
    module.double()
    return Captured(
        "export",
        module,
        dict(module.named_parameters(remove_duplicate=False)),
        dict(module.named_buffers(remove_duplicate=False)),
        artifact=captured.artifact,
    )


def _operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """Return calls by operator, the most frequent first."""
    nodes = program.graph_module.graph.nodes
    names = (str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function")
    return dict(Counter(names).most_common())
