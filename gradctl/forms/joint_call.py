"""A joint graph as a form: called like the model, with gradients that the graph itself computes, on any runtime.

A call runs the graph for the outputs, and their backward runs it with the cotangents. The random inputs of the graph
are generated here in the order in which eager generates them after the same seed.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.random import fork_rng

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.forms.form import CannotCapture, Captured, named_tensors
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.joint.capture import Joint, joint_program
from gradctl.joint.derivatives import TANGENT, inner_name, port_name
from gradctl.joint.export_error import JointExportError, raised_by
from gradctl.joint.random_inputs import RandomInput, RandomInputs
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

_GRADIENT = "grad."
_FEW = 3  # differences that a message lists


@dataclass(frozen=True, slots=True, eq=False)
class JointRuntime:
    """A runtime of a joint graph: ``run`` returns the outputs by name, for the inputs by name."""

    inputs: Sequence[str]  # names, as in ``gradctl.joint.capture``
    outputs: Sequence[str]
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def capture_joint(instance: Instance, **options: Any) -> Joint:
    """Return forward and backward of a model in one program; options as of ``joint_program``.

    Raises:
        CannotCapture: the model cannot be traced.
        TargetError: as ``joint_program``.
    """
    try:
        with silenced():
            return joint_program(instance, **options)
    except JointExportError as refusal:
        raise CannotCapture(str(refusal)) from refusal
    except TargetError:
        raise
    except Exception as error:  # tracing and the user's model may raise anything
        if is_out_of_memory(error):
            raise
        reason = reason_of(error)
        place = "" if re.search(r", line \d+\)", reason) else raised_by(error)
        if type(error).__name__ == "Unsupported":  # from torch._dynamo, which is slow to import
            reason, place = "a part of the model that Dynamo compiles, as torch.cond is", f"{place}: use torch.where"
        said = f"forward and backward cannot be traced: {reason}{place}."
        raise CannotCapture(said, traceback.format_exc()) from error


def with_ports(joint: Joint, wrt: Sequence[str]) -> Joint:
    """Return a joint program with the names of a file, which those of directional derivatives (no ``wrt``) have."""
    if wrt:
        return joint
    axes = {port_name(name): named for name, named in joint.axes.items()}
    inputs, outputs = (tuple(map(port_name, names)) for names in (joint.inputs, joint.outputs))
    return replace(joint, inputs=inputs, outputs=outputs, axes=axes)


def _without_ports(runtime: JointRuntime) -> JointRuntime:
    """Return the runtime of directional derivatives with the names that the program had before ``with_ports``."""

    def run(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = runtime.run({name: feeds[inner_name(name)] for name in runtime.inputs})
        return {inner_name(name): value for name, value in found.items()}

    return JointRuntime(list(map(inner_name, runtime.inputs)), list(map(inner_name, runtime.outputs)), run)


def gradient_targets(inputs: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the leaves whose gradients a graph with these ports computes, ``param:fc1.weight`` and ``input:x``.

    Empty if it is not a joint graph: it has no input for a cotangent.
    """
    by = _gradient_names(outputs)
    given = {name for name in inputs if name.startswith("input.")}
    names = (input_name(each.removeprefix("input.")) if each in given else parameter_name(each) for each in by)
    return tuple(names) if any(name.startswith("grad_") for name in inputs) else ()


def _gradient_names(outputs: Sequence[str]) -> list[str]:
    return [name.removeprefix(_GRADIENT) for name in outputs if name.startswith(_GRADIENT)]


def wrap_runtime(form: str, runtime: JointRuntime, instance: Instance, where: str, **attributes: Any) -> Captured:
    """Return a joint graph as a form of a model.

    The private copy is called once, and holds the state of the form; ``where`` is the name of the graph in messages,
    ``attributes`` are the other attributes of ``Captured``.

    Raises:
        TargetError: GC141 if it is not a joint graph of this model.
    """
    instance.restore()
    if any(name.startswith(f"{TANGENT}.") for name in runtime.inputs):
        runtime = _without_ports(runtime)
        attributes["quantities"] = frozenset({"output", "buffer"})
    args, kwargs = instance.inputs()
    try:
        structure, draws = run_eagerly(instance, args, kwargs)
    except JointExportError as refusal:
        raise TargetError("GC141", f"{where} is not a joint graph of {instance.subject.target}: {refusal}") from refusal
    module = module_of(instance.model)
    parameters = dict(module.named_parameters()) if module is not None else {}
    buffers = dict(module.named_buffers()) if module is not None else {}
    given = (f"input.{name}" for name, _ in input_names(instance.subject.model, args, kwargs))
    differing = _port_differences(runtime, {*parameters, *buffers, *given, *draws}, _tensors_by_output(structure))
    if differing:
        others = f" and {len(differing) - _FEW} more" if len(differing) > _FEW else ""
        said = f"{'; '.join(differing[:_FEW])}{others}"
        raise TargetError("GC141", f"{where} is not a joint graph of {instance.subject.target}: {said}.")
    return Captured(
        form,
        _Call(runtime, instance, parameters, buffers, structure),
        *named_tensors(module),
        model=instance.model if isinstance(instance.model, nn.Module) else None,
        **attributes,
    )


def _port_differences(runtime: JointRuntime, inputs: set[str], outputs: Mapping[str, Tensor]) -> list[str]:
    """Return the ports that do not belong to a joint graph of a model with these inputs and outputs."""
    known = inputs | {f"grad_{name}" for name in outputs}
    return [
        *(f"it has the unknown input {name!r}" for name in runtime.inputs if name not in known),
        *(f"it has no output {name!r}" for name in sorted(outputs.keys() - set(runtime.outputs))),
        *(
            f"it has the gradient of {name!r}, which the model does not have"
            for name in _gradient_names(runtime.outputs)
            if name not in known
        ),
    ]


def _tensors_by_output(structure: Any) -> dict[str, Tensor]:
    return {output_name(path): leaf for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}


def run_eagerly(instance: Instance, args: Any, kwargs: Any) -> tuple[Any, dict[str, RandomInput]]:
    """Return the output of a model and its random numbers; its state is restored."""
    with instance.preserve_leaves(), fork_rng(devices=()), RandomInputs(instance.model) as draws, torch.enable_grad():
        value = instance.model(*args, **kwargs)  # with gradients enabled: a model may compute gradients inside
    instance.restore()
    return value, draws.by_name


@dataclass(slots=True, eq=False)
class _Call:
    """A runtime as a callable that autograd differentiates."""

    runtime: JointRuntime
    instance: Instance  # its parameters name the inputs
    parameters: Mapping[str, Tensor]  # they receive gradients and, as buffers do, the updates of the graph
    buffers: Mapping[str, Tensor]
    structure: Any  # an output of the model
    outputs: dict[str, Tensor] = field(init=False)
    at_sizes: dict[tuple[torch.Size, ...], tuple[dict[str, torch.Size], dict[str, RandomInput]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self.outputs = _tensors_by_output(self.structure)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of one run; apply the updates of the forward to parameters and buffers."""
        named = input_names(self.instance.subject.model, args, kwargs)
        given = {f"input.{name}": value for name, value in named if isinstance(value, Tensor)}
        leaves_by_name = {**self.parameters, **given}
        targets = set(_gradient_names(self.runtime.outputs))
        names = [name for name in leaves_by_name if name in targets]
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
        """Return the sizes of the outputs, and the random inputs, from a run of eager at new input sizes."""
        sizes = tuple(each.shape for each in given.values())
        if sizes not in self.at_sizes:
            now = {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
            value, draws = run_eagerly(self.instance, args, kwargs)
            with torch.no_grad():
                for name, buffer in now.items():
                    self.buffers[name].copy_(buffer)
            outputs = {name: tensor.shape for name, tensor in _tensors_by_output(value).items()}
            self.at_sizes[sizes] = outputs, draws
        return self.at_sizes[sizes]

    def run(
        self, values: Mapping[str, Tensor], sizes: Mapping[str, torch.Size], cotangents: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return all outputs of the graph, by name; a missing cotangent is zero."""
        feeds = {name: values[name].detach() for name in self.runtime.inputs if name in values}
        for name in self.runtime.inputs:
            if name not in feeds and name not in cotangents:
                output = name.removeprefix("grad_")
                feeds[name] = self.outputs[output].new_zeros(sizes[output])
        return self.runtime.run({**feeds, **cotangents})


class _Run(torch.autograd.Function):
    """One call of a joint graph: forward and backward each run it once."""

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
        # The values at the forward: they may change before the backward.
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
            *(value for name, value in outputs.items() if f"grad_{name}" not in call.runtime.inputs)
        )
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call: _Call = ctx.call
        named = zip((f"grad_{name}" for name in call.outputs), cotangents, strict=True)
        given = {name: value for name, value in named if name in call.runtime.inputs}
        found = call.run(ctx.values, ctx.sizes, given)
        gradients = (found[f"{_GRADIENT}{name}"] for name in ctx.names)
        return None, None, None, None, *(each.to(place) for each, place in zip(gradients, ctx.places, strict=True))
