"""``torch.export``: one graph of aten operators with its parameters, run eagerly by its own module."""

from __future__ import annotations

import copy
import inspect
import re
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.subject.inputs.dynamic_sizes import Dynamic, by_leaf
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import call_signature
from gradctl.subject.tree import map_leaves

__all__ = ["FunctionModule", "capture", "capture_reason", "of_exported_program", "to_float64"]


class FunctionModule(nn.Module):
    """A plain function as the module that torch.export wants; its inputs keep the names that the function gives."""

    def __init__(self, function: Any) -> None:
        super().__init__()

        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        signature = call_signature(function)
        if signature is not None:
            forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def capture(
    instance: Instance,
    *,
    dynamic: Dynamic | None = None,
    around: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> Captured:
    """Return the model exported on its own inputs (non-strict).

    Args:
        instance: the private copy.
        dynamic: sizes that stay free, by input and axis; all others are fixed to those of the inputs.
        around: entered around the export of the module that it is given.

    Raises:
        CannotCapture: torch.export refuses the model.
        TargetError: GC104 if ``dynamic`` names an input or an axis that is not there.
    """
    args, kwargs = _apart(*instance.inputs())
    instance.restore()
    module = instance.model if isinstance(instance.model, nn.Module) else FunctionModule(instance.model)
    shapes = _dynamic_shapes(module, args, kwargs, dynamic) if dynamic else None
    seed_generators(instance.subject.seed + 1)  # not as a run is: a number that is baked in must show
    torch.compiler.reset()  # torch.cond compiles in eager too, and what it compiled under a mode is refused here
    start = perf_counter()
    try:
        with silenced(), around(module):
            program = torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=shapes)
    except Exception as error:  # the exporter or the user's model may raise anything
        raise CannotCapture(
            f"torch.export refuses the model: {capture_reason(error)}", traceback.format_exc()
        ) from error
    return of_exported_program(program, perf_counter() - start)


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with a tensor of its own in each place: torch.export takes one given twice for one input."""
    seen: set[int] = set()

    def apart(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    separate: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves(apart, (args, kwargs))
    return separate


def _dynamic_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic) -> Any:
    """Return what torch.export calls dynamic shapes: the inputs by parameter, each leaf its free axes or None."""
    signature = inspect.signature(module.forward)
    sizes = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    args, kwargs = by_leaf(
        module,
        args,
        kwargs,
        dynamic,
        lambda axes: {axis: sizes[name] for axis, name in axes.items()} or None,
    )
    shapes: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            shapes.update(shapes.pop(name, {}))
    return shapes


def capture_reason(error: Exception) -> str:
    """Return what a refusal is about; of a size that is not as free as asked, which."""
    fixed = re.search(
        r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    return f"it is fixed to {fixed[1]}={fixed[2]}, and --dynamic asks for any" if fixed else reason_of(error)


def of_exported_program(program: torch.export.ExportedProgram, seconds: float = 0.0) -> Captured:
    """Return an exported program, just captured or loaded from a file, as a form."""
    # Its guards would refuse another dtype or batch size; whether those matter is for the comparison to say.
    return _of_module(program.module(check_guards=False), program, seconds)


def _of_module(module: nn.Module, program: torch.export.ExportedProgram, seconds: float = 0.0) -> Captured:
    return Captured(
        "export",
        module,
        dict(module.named_parameters(remove_duplicate=False)),
        dict(module.named_buffers(remove_duplicate=False)),
        seconds,
        operators=_operators(program),
        artifact=program,
        model=module,
    )


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return a copy of the module with float64 parameters and buffers, to be run under the promotion."""
    assert isinstance(captured.call, nn.Module)
    return _of_module(copy.deepcopy(captured.call).double(), captured.artifact)


def _operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """Return calls by operator, the most frequent first."""
    nodes = program.graph_module.graph.nodes
    names = (str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function")
    return dict(Counter(names).most_common())
