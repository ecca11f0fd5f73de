"""ONNX, forward and backward in one graph: run by onnxruntime, with gradients by its own nodes and not by autograd.

The form is called like the model: a call runs the graph for the outputs, and their backward runs it with cotangents.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import NameFixPass, OutputFixPass
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradctl.core.errors import TargetError
from gradctl.core.names import output_name
from gradctl.forms.export import capture_reason
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.onnx import save
from gradctl.forms.onnx_file import OnnxFile, nodes, read, session
from gradctl.forms.onnx_session import run
from gradctl.forms.quiet import quiet
from gradctl.forms.reasons import reason_of
from gradctl.joint.capture import CannotJoin, Joint, joint_program
from gradctl.subject.dynamic import Dynamic
from gradctl.subject.frames import is_out_of_memory
from gradctl.subject.inputs import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["capture", "exported", "of_file", "widened"]


def capture(instance: Instance) -> Captured:
    """Return forward and backward exported to one ONNX graph, and run from a file.

    Raises:
        CannotCapture: tracing, the exporter, the checker or onnxruntime refuses the model.
    """
    captured = exported(instance)
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "joint.onnx"
        save(captured.artifact, path)
        try:
            loaded = of_file(read(path), instance)
        except TargetError as error:
            said = error.message.replace(str(path), "the exported file")
            raise CannotCapture(f"the model is exported, and {said}", traceback.format_exc()) from error
    return replace(loaded, seconds=captured.seconds)


def exported(
    instance: Instance,
    *,
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    frozen: bool = False,
    wrt: Sequence[str] = ("*",),
) -> Captured:
    """Return the joint graph in memory: a form that cannot be called yet, its artifact an ``ir.Model``.

    Args:
        instance: the private copy.
        opset: of ONNX's own operators; None leaves it to the exporter.
        dynamic: sizes that stay free, by input and axis.
        frozen: whether parameters are initializers, not inputs.
        wrt: what to differentiate by, globs of ``param:fc1.weight`` and ``input:x``.

    Raises:
        CannotCapture: the model cannot be traced, or the exporter has no conversion for an operator of its backward.
        TargetError: GC104 if ``dynamic`` names an input or an axis that is not there.
    """
    start = perf_counter()
    joint = _joint(instance, dynamic, wrt)
    try:
        with quiet():
            found = torch.onnx.export(joint.program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
            assert found is not None
            _name(found, joint, frozen=frozen)
            found.optimize()
    except Exception as error:  # the exporter may raise anything
        if is_out_of_memory(error):
            raise
        raise CannotCapture(f"torch.onnx refuses the joint graph: {_missing(error)}", traceback.format_exc()) from error
    given = found.model.opset_imports.get("")
    if opset is not None and given != opset:
        raise CannotCapture(f"the exporter gives opset {given} and cannot turn it into opset {opset}.")
    return Captured("onnx-joint", _not_called, seconds=perf_counter() - start, artifact=found.model)


def _joint(instance: Instance, dynamic: Dynamic | None, wrt: Sequence[str]) -> Joint:
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


def of_file(file: OnnxFile, instance: Instance) -> Captured:
    """Return a joint ONNX file as a form of a model.

    Args:
        file: the file; its inputs and outputs have the names of ``gradctl.joint.capture``.
        instance: a private copy of the model; it is called once, and keeps the state of the form.

    Raises:
        TargetError: GC141 if it is no joint graph of this model; GC602 if it does not run.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    with torch.enable_grad():  # a model may take gradients inside
        structure = instance.model(*args, **kwargs)
    instance.restore()
    module = module_of(instance.model)
    parameters = dict(module.named_parameters()) if module is not None else {}
    buffers = dict(module.named_buffers()) if module is not None else {}
    known = {*parameters, *buffers, *(f"input.{name}" for name, _ in input_names(instance.subject.model, args, kwargs))}
    results = {output_name(path) for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
    known |= {f"grad_{name}" for name in results}
    strange = [each.name for each in file.inputs if each.name not in known]
    lacking = sorted(results - {each.name for each in file.model.graph.output})
    if strange or lacking:
        differing = [*(f"no {name!r} to give it" for name in strange), *(f"it gives no {name!r}" for name in lacking)]
        raise TargetError(
            "GC141", f"{file.path} is no joint graph of {instance.subject.target}: {'; '.join(differing)}."
        )
    call = _Call(session(file), instance.subject.model, parameters, buffers, structure)
    return Captured(
        "onnx-joint",
        call,
        dict(module.named_parameters(remove_duplicate=False)) if module is not None else {},
        dict(module.named_buffers(remove_duplicate=False)) if module is not None else {},
        operators=dict(Counter(node.op_type for node in nodes(file.model)).most_common()),
        artifact=file,
        model=instance.model if isinstance(instance.model, nn.Module) else None,
    )


def widened(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy exported anew.

    Raises:
        CannotCapture: onnxruntime has no float64 kernel for an operator of it (Conv, Erf and others).
    """
    return capture(instance)


class _Call:
    """A session of a joint graph as a callable that autograd differentiates by the graph.

    Args:
        running: the session.
        model: whose parameters name the inputs.
        parameters, buffers: by name; gradients go to these, and what the graph updates.
        structure: an output of the model.
    """

    def __init__(
        self,
        running: onnxruntime.InferenceSession,
        model: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        structure: Any,
    ) -> None:
        self.running, self.model, self.structure = running, model, structure
        self.parameters, self.buffers = parameters, buffers
        self.inputs = [each.name for each in running.get_inputs()]
        self.outputs = [output_name(path) for path, leaf in leaves(structure) if isinstance(leaf, Tensor)]
        self.gradients = {each.name.removeprefix("grad.") for each in running.get_outputs() if each.name[:5] == "grad."}

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

    def run(self, given: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all that the graph gives, by name; a cotangent that is not given is zero."""
        values = {**self.parameters, **self.buffers, **given}
        ports = self.running.get_inputs()
        feeds = {port.name: values[port.name].detach() for port in ports if port.name in values}
        sizes = {
            size: actual
            for port in ports
            if port.name in feeds
            for size, actual in zip(port.shape, feeds[port.name].shape, strict=True)
        }
        examples = {f"grad_{output_name(path)}": leaf for path, leaf in leaves(self.structure)}
        for port in ports:
            if port.name not in feeds and port.name not in cotangents:
                example = examples[port.name]
                # A free size that no input has is one that was computed: it is as in the example, or not to be had.
                shape = [
                    sizes.get(size, example.shape[axis]) if isinstance(size, str) else size
                    for axis, size in enumerate(port.shape)
                ]
                feeds[port.name] = example.new_zeros(shape)
        return run(self.running, {**feeds, **cotangents})


class _Run(torch.autograd.Function):
    """One call of a joint graph: forward and backward are a run of it each."""

    @staticmethod
    def forward(ctx: Any, call: _Call, given: Mapping[str, Tensor], names: Sequence[str], *tensors: Tensor) -> Any:
        with torch.no_grad():
            before = {name: value.clone() for name, value in call.buffers.items()}
            found = call.run(given, {})
            for name, value in found.items():
                if name.startswith("updated."):
                    call.buffers[name.removeprefix("updated.")].copy_(value)
        ctx.call, ctx.names, ctx.before = call, names, before
        ctx.given = {name: value.detach().clone() for name, value in given.items()}
        ctx.weights = {name: value.detach().clone() for name, value in call.parameters.items()}
        outputs = tuple(found[name] for name in call.outputs)
        ctx.mark_non_differentiable(
            *(value for name, value in zip(call.outputs, outputs, strict=True) if f"grad_{name}" not in call.inputs)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call: _Call = ctx.call
        named = zip((f"grad_{name}" for name in call.outputs), cotangents, strict=True)
        given = {name: value for name, value in named if name in call.inputs}
        # The graph is given what the forward had, whatever has become of it since.
        found = call.run({**ctx.weights, **ctx.before, **ctx.given}, given)
        return None, None, None, *(found[f"grad.{name}"] for name in ctx.names)


def _not_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a graph in memory is saved and read again before it is run")


def _name(program: torch.onnx.ONNXProgram, joint: Joint, *, frozen: bool) -> None:
    """Give inputs, outputs and free sizes their names, and make initializers of inputs that do not change."""
    model = program.model
    graph = model.graph
    sizes: dict[str | ir.SymbolicDim, str] = {}
    for name, value in zip(joint.inputs, graph.inputs, strict=True):
        for axis, size in joint.axes[name].items():
            free = value.shape[axis] if value.shape is not None else None
            if isinstance(free, ir.SymbolicDim):
                sizes[free] = size
    program.rename_axes(sizes)
    OutputFixPass()(model)  # an output that is an input, or another output, gets a name of its own
    for value, name in zip([*graph.inputs, *graph.outputs], [*joint.inputs, *joint.outputs], strict=True):
        value.name = name
    constants = {*joint.constants, *(joint.values if frozen else ())}
    for value in [each for each in graph.inputs if each.name in constants]:
        assert value.name is not None
        tensor = joint.values[value.name].detach().cpu().contiguous()
        value.const_value = ir.tensor(tensor, name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
    NameFixPass()(model)


def _missing(error: BaseException) -> str:
    """Return what an exporter's wrapping of errors was about."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason_of(error)
