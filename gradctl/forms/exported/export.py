"""``torch.export``: one graph of aten operators with its parameters, run eagerly by its own module."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.forms.form import CannotCapture, Captured, named_tensors
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.joint.export_error import JointExportError
from gradctl.subject.inputs.dynamic_sizes import Dynamic, by_leaf
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import call_signature, module_of
from gradctl.subject.tree import map_leaves

Around = Callable[[nn.Module], AbstractContextManager[Any]]


class FunctionModule(nn.Module):
    """A plain function as a module for torch.export; its inputs keep the names that the function defines."""

    def __init__(self, function: Any, signature: inspect.Signature | None = None) -> None:
        super().__init__()

        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        signature = signature or call_signature(function)
        if signature is not None:
            forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def capture(
    instance: Instance,
    *,
    dynamic: Dynamic | None = None,
    around: Around = nullcontext,
) -> Captured:
    """Return the model exported on its own inputs (non-strict).

    Args:
        instance: the private copy.
        dynamic: symbolic sizes, by input and axis; all others are fixed to those of the inputs.
        around: returns a context, for the module, in which it is exported.

    Raises:
        CannotCapture: torch.export rejects the model.
        TargetError: GC104 if ``dynamic`` names an unknown input or axis.
    """
    try:
        return _export(instance, _as_module(instance.model), dynamic, around)
    except CannotCapture as refusal:
        return capture_differentiated(instance, refusal, dynamic=dynamic, around=around)


def capture_differentiated(
    instance: Instance, refusal: CannotCapture, *, dynamic: Dynamic | None, around: Around = nullcontext
) -> Captured:
    """Return a model that differentiates in its forward, traced with its inner backward, and then exported.

    Args:
        instance, dynamic, around: as in ``capture``.
        refusal: of the model without that, to be raised for one that does not differentiate inside.

    Raises:
        CannotCapture: the ``refusal``, or it cannot be traced.
    """
    # torch's symbolic shapes take a third of a second to import, and few models need them here.
    from gradctl.forms.joint_call import capture_joint, run_eagerly
    from gradctl.joint.inner_gradients import differentiates_inside, replay

    start = perf_counter()
    if not differentiates_inside(instance):
        raise refusal
    structure, _ = run_eagerly(instance, *instance.inputs())
    try:
        joint = capture_joint(instance, dynamic=dynamic, wrt=())
        module = FunctionModule(replay(joint, instance, structure), call_signature(instance.model))
        if (owner := module_of(instance.model)) is not None:
            # Their own names in the program. Hooks of the module are in the graph, and run no second time.
            module._parameters, module._buffers, module._modules = owner._parameters, owner._buffers, owner._modules
            module._non_persistent_buffers_set = owner._non_persistent_buffers_set
            module.train(owner.training)
        captured = _export(instance, module, dynamic, around)
    except (CannotCapture, JointExportError) as error:
        raise CannotCapture(f"the model differentiates in its forward, and {error}", refusal.details) from error
    said = refusal.reason.partition(" refuses ")[0]
    reason = f"the model differentiates in its forward, which {said} refuses: traced by gradctl with its inner backward"
    return replace(captured, reason=reason, seconds=perf_counter() - start)


def _as_module(model: Callable[..., Any]) -> nn.Module:
    return model if isinstance(model, nn.Module) else FunctionModule(model)


def _export(instance: Instance, module: nn.Module, dynamic: Dynamic | None, around: Around) -> Captured:
    args, kwargs = _apart(*instance.inputs())
    instance.restore()
    shapes = _dynamic_shapes(module, args, kwargs, dynamic) if dynamic else None
    seed_generators(instance.subject.seed + 1)  # not the seed of a run: a number fixed at capture must differ
    torch.compiler.reset()  # torch.cond compiles in eager too, and code that it compiled under a mode is rejected here
    start = perf_counter()
    try:
        with silenced(), around(module):
            program = torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=shapes)
    except Exception as error:  # the exporter or the user's model may raise anything
        raise CannotCapture(f"torch.export refuses the model: {reason_of(error)}", traceback.format_exc()) from error
    return wrap_exported_program(program, perf_counter() - start)


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with distinct tensors: torch.export merges inputs that are the same tensor."""
    seen: set[int] = set()

    def apart(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    separate: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves(apart, (args, kwargs))
    return separate


def _dynamic_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Dynamic) -> Any:
    """Return torch.export's dynamic shapes: the inputs by parameter, each leaf with its symbolic axes or None."""
    signature = inspect.signature(module.forward)
    sizes = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    args, kwargs = by_leaf(
        module, args, kwargs, dynamic, lambda axes: {axis: sizes[name] for axis, name in axes.items()} or None
    )
    shapes: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            shapes.update(shapes.pop(name, {}))
    return shapes


def wrap_exported_program(program: torch.export.ExportedProgram, seconds: float = 0.0) -> Captured:
    """Return an exported program, just captured or loaded from a file, as a form."""
    # Its guards would reject other dtypes and batch sizes; the comparison decides if these matter.
    return _wrap_module(program.module(check_guards=False), program, seconds)


def _wrap_module(module: nn.Module, program: torch.export.ExportedProgram, seconds: float = 0.0) -> Captured:
    return Captured(
        "export",
        module,
        *named_tensors(module),
        seconds,
        operators=count_operators(program),
        artifact=program,
        model=module,
    )


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return a copy of the module with float64 parameters and buffers, to run with promotion enabled."""
    assert isinstance(captured.call, nn.Module)
    return _wrap_module(copy.deepcopy(captured.call).double(), captured.artifact)


def count_operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """Return calls by operator, the most frequent first."""
    nodes = program.graph_module.graph.nodes
    names = (str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function")
    return dict(Counter(names).most_common())
