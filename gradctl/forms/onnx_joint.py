"""ONNX, forward and backward in one graph: run by onnxruntime, with gradients by its own nodes and not by autograd."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, OutputFixPass

from gradctl.core.names import input_name, parameter_name
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.joint_call import Engine, joint_of, of_engine
from gradctl.forms.onnx import by_file
from gradctl.forms.onnx_file import OnnxFile, nodes, session
from gradctl.forms.onnx_session import run
from gradctl.forms.quiet import quiet
from gradctl.forms.reasons import reason_of
from gradctl.joint.capture import Joint
from gradctl.subject.dynamic import Dynamic
from gradctl.subject.frames import is_out_of_memory
from gradctl.subject.instance import Instance

__all__ = ["capture", "differentiated", "exported", "of_file", "widened"]


def capture(instance: Instance) -> Captured:
    """Return forward and backward exported to one ONNX graph, and run from a file.

    Raises:
        CannotCapture: tracing, the exporter, the checker or onnxruntime refuses the model.
    """
    return by_file(exported(instance), lambda file: of_file(file, instance))


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
    joint = joint_of(instance, dynamic, wrt)
    _ensure_numpys(joint)
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


def of_file(file: OnnxFile, instance: Instance) -> Captured:
    """Return a joint ONNX file as a form of a model.

    Args:
        file: the file; its inputs and outputs have the names of ``gradctl.joint.capture``.
        instance: a private copy of the model; it is called once, and keeps the state of the form.

    Raises:
        TargetError: GC141 if it is no joint graph of this model; GC602 if it does not run.
    """
    running = session(file)
    engine = Engine(
        {each.name: each.shape for each in running.get_inputs()},
        [each.name for each in running.get_outputs()],
        lambda feeds: run(running, feeds),
    )
    operators = dict(Counter(node.op_type for node in nodes(file.model)).most_common())
    return of_engine("onnx-joint", engine, instance, str(file.path), operators=operators, artifact=file)


def differentiated(file: OnnxFile) -> tuple[str, ...]:
    """Return what a file gives gradients by, ``param:fc1.weight`` and ``input:x``; nothing if it is no joint graph."""
    by = [each.name.removeprefix("grad.") for each in file.model.graph.output if each.name.startswith("grad.")]
    is_joint = any(each.name.startswith("grad_") for each in file.inputs)
    inputs = {each.name for each in file.inputs if each.name.startswith("input.")}
    names = (input_name(each.removeprefix("input.")) if each in inputs else parameter_name(each) for each in by)
    return tuple(names) if is_joint else ()


def widened(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy exported anew.

    Raises:
        CannotCapture: onnxruntime has no float64 kernel for an operator of it (Conv, Erf and others).
    """
    return capture(instance)


def _ensure_numpys(joint: Joint) -> None:
    """Raise for an input or output that numpy's arrays have no type for, or onnxruntime no kernels."""
    *others, last = joint.program.graph.nodes
    ports = [*(node for node in others if node.op == "placeholder"), *last.all_input_nodes]
    for value in [node.meta.get("val") for node in ports]:
        if isinstance(value, torch.Tensor) and (value.dtype == torch.bfloat16 or value.is_complex()):
            raise CannotCapture(f"onnxruntime takes no {str(value.dtype).removeprefix('torch.')} on the CPU.")


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
