"""A joint graph as a form: called like the model, and differentiated by the graph itself, whatever runs it.

A call runs the graph for the outputs, and their backward runs it with the cotangents. Random numbers that the graph
takes are drawn here, as eager draws them after the same seed: as many, in the same order.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradctl.core.errors import TargetError
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.forms.exported.export import capture_reason
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.silence import silenced
from gradctl.joint.capture import Joint, joint_program
from gradctl.joint.export_error import JointExportError, raised_by
from gradctl.joint.random_inputs import RandomInput, RandomInputs, preserve_generator
from gradctl.subject.frames import is_out_of_memory
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["JointRuntime", "differentiated", "joint_of", "of_engine"]

_GRADIENT = "grad."
_FEW = 3  # differences that a message lists


@dataclass(frozen=True, slots=True, eq=False)
class JointRuntime:
    """What runs a joint graph.

    Attributes:
        inputs, outputs: names, those of ``gradctl.joint.capture``.
        run: gives the outputs by name, for the inputs by name.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def joint_of(instance: Instance, dynamic: Dynamic | None = None, wrt: Sequence[str] = ("*",)) -> Joint:
    """Return forward and backward of a model in one program; arguments as ``joint_program``.

    Raises:
        CannotCapture: the model cannot be traced.
        TargetError: as ``joint_program``.
    """
    try:
        with silenced():
            return joint_program(instance, dynamic=dynamic, wrt=wrt)
    except JointExportError as refusal:
        raise CannotCapture(str(refusal)) from refusal
    except TargetError:
        raise
    except Exception as error:  # tracing and the user's model may raise anything
        if is_out_of_memory(error):
            raise
        reason = capture_reason(error)
        place = "" if re.search(r", line \d+\)$", reason) else raised_by(error)
        if type(error).__name__ == "Unsupported":  # of torch._dynamo, which is slow to import
            reason, place = "a part of the model that Dynamo compiles, as torch.cond is", f"{place}: use torch.where"
        said = f"forward and backward cannot be traced: {reason}{place}."
        raise CannotCapture(said, traceback.format_exc()) from error


def differentiated(inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """Return what a graph with these ports gives gradients by, ``param:fc1.weight`` and ``input:x``.

    Nothing if it is no joint graph: it takes no cotangent.
    """
    by = [name.removeprefix(_GRADIENT) for name in outputs if name.startswith(_GRADIENT)]
    given = {name for name in inputs if name.startswith("input.")}
    names = (input_name(each.removeprefix("input.")) if each in given else parameter_name(each) for each in by)
    return tuple(names) if any(name.startswith("grad_") for name in inputs) else ()


def of_engine(form: str, engine: JointRuntime, instance: Instance, where: str, **about: Any) -> Captured:
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
    try:
        structure, draws = _run_eagerly(instance, args, kwargs)
    except JointExportError as refusal:
        raise TargetError("GC141", f"{where} is no joint graph of {instance.subject.target}: {refusal}") from refusal
    module = module_of(instance.model)
    parameters = dict(module.named_parameters()) if module is not None else {}
    buffers = dict(module.named_buffers()) if module is not None else {}
    results = {output_name(path) for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
    given = {f"input.{name}" for name, _ in input_names(instance.subject.model, args, kwargs)}
    known = {*parameters, *buffers, *given, *draws, *(f"grad_{name}" for name in results)}
    differing = [f"it takes {name!r}, which is not there" for name in engine.inputs if name not in known]
    differing += [f"it gives no {name!r}" for name in sorted(results - set(engine.outputs))]
    by = [name.removeprefix(_GRADIENT) for name in engine.outputs if name.startswith(_GRADIENT)]
    differing += [f"it gives a gradient by {name!r}, which is not there" for name in by if name not in known]
    if differing:
        others = f" and {len(differing) - _FEW} more" if len(differing) > _FEW else ""
        said = f"{'; '.join(differing[:_FEW])}{others}"
        raise TargetError("GC141", f"{where} is no joint graph of {instance.subject.target}: {said}.")
    return Captured(
        form,
        _Call(engine, instance, parameters, buffers, structure),
        dict(module.named_parameters(remove_duplicate=False)) if module is not None else {},
        dict(module.named_buffers(remove_duplicate=False)) if module is not None else {},
        model=instance.model if isinstance(instance.model, nn.Module) else None,
        **about,
    )


def _run_eagerly(instance: Instance, args: Any, kwargs: Any) -> tuple[Any, dict[str, RandomInput]]:
    """Return what a model gives and what it draws; its state is put back."""
    with instance.preserve_leaves(), preserve_generator(), RandomInputs(instance.model) as draws, torch.enable_grad():
        value = instance.model(*args, **kwargs)  # which may take gradients inside
    instance.restore()
    return value, draws.by_name


class _Call:
    """An engine as a callable that autograd differentiates.

    Args:
        engine: what runs the graph.
        instance: the model, whose parameters name the inputs.
        parameters, buffers: by name; gradients go to these, and what the graph updates.
        structure: an output of the model.
    """

    def __init__(
        self,
        engine: JointRuntime,
        instance: Instance,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        structure: Any,
    ) -> None:
        self.engine, self.instance, self.structure = engine, instance, structure
        self.parameters, self.buffers = parameters, buffers
        self.outputs = {output_name(path): leaf for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
        self.at_sizes: dict[tuple[torch.Size, ...], tuple[dict[str, torch.Size], dict[str, RandomInput]]] = {}
        self.gradients = {name.removeprefix(_GRADIENT) for name in engine.outputs if name.startswith(_GRADIENT)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of one run; parameters and buffers that the forward changes are changed."""
        named = input_names(self.instance.subject.model, args, kwargs)
        given = {f"input.{name}": value for name, value in named if isinstance(value, Tensor)}
        leaves_by_name = {**self.parameters, **given}
        names = [name for name in leaves_by_name if name in self.gradients]
        sizes, draws = self._as_eager(args, kwargs, given)
        given |= {name: draw.again() for name, draw in draws.items()}
        found = _Run.apply(self, given, sizes, names, *(leaves_by_name[name] for name in names))  # type: ignore[no-untyped-call]
        by_name = dict(zip(self.outputs, found, strict=True))
        return map_leaves(
            lambda path, leaf: by_name[output_name(path)] if isinstance(leaf, Tensor) else leaf, self.structure
        )

    def _as_eager(
        self, args: Any, kwargs: Any, given: Mapping[str, Tensor]
    ) -> tuple[dict[str, torch.Size], dict[str, RandomInput]]:
        """Return the sizes of the outputs, and the draws: where the inputs have sizes not seen before, eager is run."""
        sizes = tuple(each.shape for each in given.values())
        if sizes not in self.at_sizes:
            now = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
            value, draws = _run_eagerly(self.instance, args, kwargs)
            with torch.no_grad():
                for name, buffer in now.items():
                    self.buffers[name].copy_(buffer)
            outputs = {output_name(path): leaf.shape for path, leaf in leaves(value) if isinstance(leaf, Tensor)}
            self.at_sizes[sizes] = outputs, draws
        return self.at_sizes[sizes]

    def run(
        self, values: Mapping[str, Tensor], sizes: Mapping[str, torch.Size], cotangents: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return all that the graph gives, by name; a cotangent that is not given is zero."""
        feeds = {name: values[name].detach() for name in self.engine.inputs if name in values}
        for name in self.engine.inputs:
            if name not in feeds and name not in cotangents:
                output = name.removeprefix("grad_")
                feeds[name] = self.outputs[output].new_zeros(sizes[output])
        return self.engine.run({**feeds, **cotangents})


class _Run(torch.autograd.Function):
    """One call of a joint graph: forward and backward are a run of it each."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        given: Mapping[str, Tensor],
        sizes: Mapping[str, torch.Size],
        names: Sequence[str],
        *tensors: Tensor,
    ) -> Any:
        state = {**call.parameters, **call.buffers, **given}
        # What the forward had, whatever becomes of it before the backward.
        ctx.values = {name: value.detach().clone() for name, value in state.items()}
        ctx.call, ctx.sizes, ctx.names = call, sizes, names
        ctx.places = [tensor.device for tensor in tensors]
        with torch.no_grad():
            found = call.run(ctx.values, sizes, {})
            for name, value in found.items():
                if name.startswith("updated."):
                    state[name.removeprefix("updated.")].copy_(value)
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
        given = {name: value for name, value in named if name in call.engine.inputs}
        found = call.run(ctx.values, ctx.sizes, given)
        gradients = (found[f"{_GRADIENT}{name}"] for name in ctx.names)
        return None, None, None, None, *(each.to(place) for each, place in zip(gradients, ctx.places, strict=True))
