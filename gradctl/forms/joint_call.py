"""A joint graph as a form: called like the model, and differentiated by the graph itself, whatever runs it.

A call runs the graph for the outputs, and their backward runs it with the cotangents.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradctl.core.errors import TargetError
from gradctl.core.names import output_name
from gradctl.forms.export import capture_reason
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.quiet import quiet
from gradctl.joint.capture import CannotJoin, Joint, joint_program
from gradctl.subject.dynamic import Dynamic
from gradctl.subject.frames import is_out_of_memory
from gradctl.subject.inputs import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["Engine", "joint_of", "of_engine"]

_GRADIENT = "grad."


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """What runs a joint graph.

    Attributes:
        inputs: shape by name, free sizes as words; the names are those of ``gradctl.joint.capture``.
        outputs: names.
        run: gives the outputs by name, for the inputs by name.
    """

    inputs: Mapping[str, Sequence[int | str]]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def joint_of(instance: Instance, dynamic: Dynamic | None = None, wrt: Sequence[str] = ("*",)) -> Joint:
    """Return forward and backward of a model in one program; arguments as ``joint_program``.

    Raises:
        CannotCapture: the model cannot be traced.
        TargetError: as ``joint_program``.
    """
    try:
        with quiet():
            return joint_program(instance, dynamic=dynamic, wrt=wrt)
    except CannotJoin as refusal:
        raise CannotCapture(str(refusal)) from refusal
    except TargetError:
        raise
    except Exception as error:  # tracing and the user's model may raise anything
        if is_out_of_memory(error):
            raise
        said = f"forward and backward cannot be traced: {capture_reason(error)}"
        raise CannotCapture(said, traceback.format_exc()) from error


def of_engine(form: str, engine: Engine, instance: Instance, where: str, **about: Any) -> Captured:
    """Return a joint graph as a form of a model.

    Args:
        form: its name.
        engine: what runs it.
        instance: a private copy of the model; it is called once, and keeps the state of the form.
        where: what messages call it.
        about: the other attributes of ``Captured``.

    Raises:
        TargetError: GC141 if it is no joint graph of this model.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    with torch.enable_grad():  # a model may take gradients inside
        structure = instance.model(*args, **kwargs)
    instance.restore()
    module = module_of(instance.model)
    parameters = dict(module.named_parameters()) if module is not None else {}
    buffers = dict(module.named_buffers()) if module is not None else {}
    results = {output_name(path) for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
    given = {f"input.{name}" for name, _ in input_names(instance.subject.model, args, kwargs)}
    known = {*parameters, *buffers, *given, *(f"grad_{name}" for name in results)}
    differing = [f"no {name!r} to give it" for name in engine.inputs if name not in known]
    differing += [f"it gives no {name!r}" for name in sorted(results - set(engine.outputs))]
    by = [name.removeprefix(_GRADIENT) for name in engine.outputs if name.startswith(_GRADIENT)]
    differing += [f"it gives a gradient by {name!r}, which is not there" for name in by if name not in known]
    if differing:
        raise TargetError("GC141", f"{where} is no joint graph of {instance.subject.target}: {'; '.join(differing)}.")
    return Captured(
        form,
        _Call(engine, instance.subject.model, parameters, buffers, structure),
        dict(module.named_parameters(remove_duplicate=False)) if module is not None else {},
        dict(module.named_buffers(remove_duplicate=False)) if module is not None else {},
        model=instance.model if isinstance(instance.model, nn.Module) else None,
        **about,
    )


class _Call:
    """An engine as a callable that autograd differentiates.

    Args:
        engine: what runs the graph.
        model: whose parameters name the inputs.
        parameters, buffers: by name; gradients go to these, and what the graph updates.
        structure: an output of the model.
    """

    def __init__(
        self,
        engine: Engine,
        model: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        structure: Any,
    ) -> None:
        self.engine, self.model, self.structure = engine, model, structure
        self.parameters, self.buffers = parameters, buffers
        self.outputs = {output_name(path): leaf for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
        self.gradients = {name.removeprefix(_GRADIENT) for name in engine.outputs if name.startswith(_GRADIENT)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of one run; buffers that the forward changes are changed."""
        named = input_names(self.model, args, kwargs)
        given = {f"input.{name}": value for name, value in named if isinstance(value, Tensor)}
        leaves_by_name = {**self.parameters, **given}
        names = [name for name in leaves_by_name if name in self.gradients]
        found = _Run.apply(self, given, names, *(leaves_by_name[name] for name in names))  # type: ignore[no-untyped-call]
        by_name = dict(zip(self.outputs, found, strict=True))
        return map_leaves(
            lambda path, leaf: by_name[output_name(path)] if isinstance(leaf, Tensor) else leaf, self.structure
        )

    def run(self, values: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return all that the graph gives, by name; a cotangent that is not given is zero."""
        feeds = {name: values[name].detach() for name in self.engine.inputs if name in values}
        sizes: dict[int | str, int] = {}
        for name, value in feeds.items():
            sizes.update(zip(self.engine.inputs[name], value.shape, strict=True))
        for name, shape in self.engine.inputs.items():
            if name not in feeds and name not in cotangents:
                example = self.outputs[name.removeprefix("grad_")]
                # A free size that no input has is one that was computed: it is as in the example, or not to be had.
                actual = [
                    sizes.get(size, example.shape[axis]) if isinstance(size, str) else size
                    for axis, size in enumerate(shape)
                ]
                feeds[name] = example.new_zeros(actual)
        return self.engine.run({**feeds, **cotangents})


class _Run(torch.autograd.Function):
    """One call of a joint graph: forward and backward are a run of it each."""

    @staticmethod
    def forward(ctx: Any, call: _Call, given: Mapping[str, Tensor], names: Sequence[str], *tensors: Tensor) -> Any:
        state = {**call.parameters, **call.buffers, **given}
        # What the forward had, whatever becomes of it before the backward.
        ctx.values = {name: value.detach().clone() for name, value in state.items()}
        ctx.call, ctx.names, ctx.places = call, names, [tensor.device for tensor in tensors]
        with torch.no_grad():
            found = call.run(ctx.values, {})
            for name, value in found.items():
                if name.startswith("updated."):
                    call.buffers[name.removeprefix("updated.")].copy_(value)
        outputs = {name: found[name].to(example.device) for name, example in call.outputs.items()}
        ctx.mark_non_differentiable(
            *(value for name, value in outputs.items() if f"grad_{name}" not in call.engine.inputs)
        )
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call: _Call = ctx.call
        named = zip((f"grad_{name}" for name in call.outputs), cotangents, strict=True)
        found = call.run(ctx.values, {name: value for name, value in named if name in call.engine.inputs})
        gradients = (found[f"{_GRADIENT}{name}"] for name in ctx.names)
        return None, None, None, *(each.to(place) for each, place in zip(gradients, ctx.places, strict=True))
