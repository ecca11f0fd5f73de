"""ONNX, forward and backward in one graph: run by onnxruntime, with gradients from its own nodes, not autograd."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from time import perf_counter

import onnx_ir as ir
import torch

from gradctl.forms.form import CannotCapture, Captured, not_called
from gradctl.forms.joint_call import JointRuntime, capture_joint, gradient_targets, with_ports, wrap_runtime
from gradctl.forms.onnx.forward import convert, name_ports, run_from_file
from gradctl.forms.onnx.lowering import optimize, skip_decompositions
from gradctl.forms.reasons import reason_of
from gradctl.joint.capture import Joint
from gradctl.joint.optimizer_update import LEARNING_RATE, NEXT, OptimizerUpdate
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.session import Run, load
from gradctl.onnxio.validation import nodes
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance

_UNKNOWN = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")
# By the name of an operator, the first that fits.
_INSTEAD = (
    (r"^(?!aten\.|prims\.)", "it is not an operator of torch; use operators of torch"),
    (r"sparse|_coo|_cs[rc]", "use dense tensors"),
    (r"quantize", "use a straight-through rounding: x + (rounded - x).detach()"),
    (r"median|mode|kthvalue", "sort, and select the element"),
    (r"linalg|_svd|_eig|lu_|lobpcg", "compute it outside of the model, and pass the result as an input"),
    (r"", "use other operators, or compute it outside of the model and pass the result as an input"),
)


def capture(instance: Instance) -> Captured:
    """Return forward and backward exported to one ONNX graph, and run from a file.

    Raises:
        CannotCapture: tracing, the exporter, the checker or onnxruntime rejects the model.
    """
    return run_from_file(export_graph(instance), lambda file: wrap_file(file, instance))


def export_graph(
    instance: Instance,
    *,
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    frozen: bool = False,
    wrt: Sequence[str] = ("*",),
    update: OptimizerUpdate | None = None,
) -> Captured:
    """Return the joint graph in memory as a form that cannot be called yet; its artifact is an ``ir.Model``.

    Args:
        instance: the private copy.
        opset: of ONNX's own operators; None for the exporter's default.
        dynamic: symbolic sizes, by input and axis.
        frozen: whether parameters are initializers, not inputs.
        wrt: the leaves to differentiate with respect to, globs of ``param:fc1.weight`` and ``input:x``; without any,
            the model is one of directional derivatives (``gradctl.joint.derivatives``).
        update: the step of an optimizer, which the graph makes, too; its other parameters are initializers.

    Raises:
        CannotCapture: the model cannot be traced, or the exporter has no conversion for an operator of its backward.
        TargetError: GC104 if ``dynamic`` names an unknown input or axis.
    """
    start = perf_counter()
    joint = with_ports(capture_joint(instance, dynamic=dynamic, wrt=wrt, update=update), wrt)
    _ensure_numpy_dtypes(joint)
    changed = {name.removeprefix(NEXT) for name in joint.outputs}
    is_constant = frozen or update is not None
    constants = {*joint.constants, *(name for name in joint.values if is_constant and name not in changed)}
    constants -= {LEARNING_RATE} if update is not None else set()

    def graph_of(program: torch.export.ExportedProgram) -> ir.Model:
        return convert(
            program,
            opset,
            lambda found: _name(found, joint, constants),
            lambda error: _refusal(error, joint),
            lambda found: optimize(found.model),
        )

    try:
        model = graph_of(skip_decompositions(joint.program))
    except CannotCapture:  # torch.onnx supports an operator only by its own decomposition
        model = graph_of(joint.program)
    return Captured("onnx-joint", not_called, seconds=perf_counter() - start, artifact=model)


def wrap_file(
    file: OnnxFile, instance: Instance, form: str = "onnx-joint", load_in: Callable[[OnnxFile], Run] | None = None
) -> Captured:
    """Return a joint ONNX file as a form of a model.

    Args:
        file: the file, with inputs and outputs named as in ``gradctl.joint.capture``.
        instance: a private copy of the model; it is called once, and holds the state of the form.
        form: the name of the form.
        load_in: loads the file in another runtime than onnxruntime.

    Raises:
        TargetError: GC141 if it is not a joint graph of this model; GC602 if it does not run.
    """
    running = load_in(file) if load_in is not None else load(file, instance.subject.provider)
    outputs = [each.name for each in file.model.graph.output]
    runtime = JointRuntime([each.name for each in file.inputs], outputs, running)
    operators = dict(Counter(node.op_type for node in nodes(file.model)).most_common())
    return wrap_runtime(form, runtime, instance, str(file.path), operators=operators, artifact=file)


def file_gradient_targets(file: OnnxFile) -> tuple[str, ...]:
    """Return the leaves whose gradients a file computes; empty if it is not a joint graph."""
    return gradient_targets([each.name for each in file.inputs], [each.name for each in file.model.graph.output])


def _ensure_numpy_dtypes(joint: Joint) -> None:
    """Raise for an input or output whose dtype numpy does not have, or onnxruntime has no kernels for."""
    *others, last = joint.program.graph.nodes
    taken = [node for node in others if node.op == "placeholder"][-len(joint.inputs) :]  # after its constants
    ports = [*taken, *last.args[0]]
    for name, node in zip((*joint.inputs, *joint.outputs), ports, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.dtype == torch.bfloat16 or value.is_complex()):
            dtype = str(value.dtype).removeprefix("torch.")
            instead = "pass it as torch.view_as_real" if value.is_complex() else "use float32"
            raise CannotCapture(f"{name!r} is {dtype}, which onnxruntime does not support on the CPU: {instead}.")


def _refusal(error: BaseException, joint: Joint) -> str:
    """Return why torch.onnx rejects a joint graph: the operator, the user's line, and the alternative."""
    unknown = _UNKNOWN.search(str(error))
    named = unknown or re.search(r"\baten_(\w+)()", str(error))
    name, overload = named.groups() if named is not None else ("", "")
    # torch.onnx may have decomposed the operator to one of another namespace.
    like = (place for each, place in joint.places.items() if each.split(".")[1:2] == [name.rpartition(".")[2]])
    place = joint.places.get(f"{name}.{overload}") or next(like, "")
    if unknown is None:
        return f"torch.onnx refuses the joint graph: {reason_of(error)}{place}."
    instead = next(said for pattern, said in _INSTEAD if re.search(pattern, name))
    return f"ONNX has no operator for {name}{place}: {instead}."


def _name(program: torch.onnx.ONNXProgram, joint: Joint, constants: Collection[str]) -> None:
    """Name inputs, outputs and symbolic sizes, and turn the inputs in ``constants`` into initializers.

    The metadata of the model describe the random inputs: ``random.dropout``, with its distribution as JSON.
    """
    program.model.metadata_props.update({name: json.dumps(draw) for name, draw in joint.random_inputs.items()})
    name_ports(program, joint.inputs, joint.outputs, joint.axes)
    graph = program.model.graph
    for value in [each for each in graph.inputs if each.name in constants]:
        assert value.name is not None
        tensor = joint.values[value.name].detach().cpu().contiguous()
        value.const_value = ir.tensor(tensor, name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
