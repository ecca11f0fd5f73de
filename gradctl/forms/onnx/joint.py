"""ONNX, forward and backward in one graph: run by onnxruntime, with gradients by its own nodes and not by autograd."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from time import perf_counter

import onnx_ir as ir
import torch

from gradctl.forms.form import CannotCapture, Captured, not_called
from gradctl.forms.joint_call import JointRuntime, differentiated, joint_of, of_engine
from gradctl.forms.onnx.forward import by_file, converted, name_ports
from gradctl.forms.onnx.lowering import decomposed, optimize
from gradctl.forms.reasons import reason_of
from gradctl.joint.capture import Joint
from gradctl.onnxio.onnx_file import OnnxFile, nodes, session
from gradctl.onnxio.session import run
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance

__all__ = ["capture", "differentiated_by", "exported", "of_file", "to_float64"]

_UNKNOWN = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>")
# By the name of an operator, the first that fits.
_INSTEAD = (
    (r"^(?!aten\.|prims\.)", "it is no operator of torch; write it with those that are"),
    (r"sparse|_coo|_cs[rc]", "use dense tensors"),
    (r"quantize", "round by hand, straight through: x + (rounded - x).detach()"),
    (r"median|mode|kthvalue", "sort, and take the entry"),
    (r"linalg|_svd|_eig|lu_|lobpcg", "compute it outside, and give what it gives as an input"),
    (r"", "write it with other operators, or compute it outside and give what it gives as an input"),
)


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

    def graph_of(program: torch.export.ExportedProgram) -> ir.Model:
        return converted(
            program,
            opset,
            lambda found: _name(found, joint, frozen=frozen),
            lambda error: _refusal(error, joint),
            lambda found: optimize(found.model),
        )

    try:
        model = graph_of(decomposed(joint.program))
    except CannotCapture:  # an operator that torch.onnx knows by its own decomposition alone
        model = graph_of(joint.program)
    return Captured("onnx-joint", not_called, seconds=perf_counter() - start, artifact=model)


def of_file(file: OnnxFile, instance: Instance) -> Captured:
    """Return a joint ONNX file as a form of a model.

    Args:
        file: the file; its inputs and outputs have the names of ``gradctl.joint.capture``.
        instance: a private copy of the model; it is called once, and keeps the state of the form.

    Raises:
        TargetError: GC141 if it is no joint graph of this model; GC602 if it does not run.
    """
    running = session(file)
    engine = JointRuntime(
        [each.name for each in running.get_inputs()],
        [each.name for each in running.get_outputs()],
        lambda feeds: run(running, feeds),
    )
    operators = dict(Counter(node.op_type for node in nodes(file.model)).most_common())
    return of_engine("onnx-joint", engine, instance, str(file.path), operators=operators, artifact=file)


def differentiated_by(file: OnnxFile) -> tuple[str, ...]:
    """Return what a file gives gradients by; nothing if it is no joint graph."""
    return differentiated([each.name for each in file.inputs], [each.name for each in file.model.graph.output])


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy exported anew.

    Raises:
        CannotCapture: onnxruntime has no float64 kernel for an operator of it (Conv, Erf and others).
    """
    return capture(instance)


def _ensure_numpys(joint: Joint) -> None:
    """Raise for an input or output that numpy's arrays have no type for, or onnxruntime no kernels."""
    *others, last = joint.program.graph.nodes
    taken = [node for node in others if node.op == "placeholder"][-len(joint.inputs) :]  # after its constants
    ports = [*taken, *last.args[0]]
    for name, node in zip((*joint.inputs, *joint.outputs), ports, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (value.dtype == torch.bfloat16 or value.is_complex()):
            dtype = str(value.dtype).removeprefix("torch.")
            instead = "give it as torch.view_as_real" if value.is_complex() else "use float32"
            raise CannotCapture(f"{name!r} is {dtype}, which onnxruntime does not take on the CPU: {instead}.")


def _refusal(error: BaseException, joint: Joint) -> str:
    """Return why torch.onnx takes no joint graph: the operator, the user's line, and what there is instead."""
    unknown = _UNKNOWN.search(str(error))
    named = unknown or re.search(r"\baten_(\w+)()", str(error))
    name, overload = named.groups() if named is not None else ("", "")
    # What has no conversion may be what torch.onnx made of it, by another name space.
    like = (place for each, place in joint.places.items() if each.split(".")[1:2] == [name.rpartition(".")[2]])
    place = joint.places.get(f"{name}.{overload}") or next(like, "")
    if unknown is None:
        return f"torch.onnx refuses the joint graph: {reason_of(error)}{place}."
    instead = next(said for pattern, said in _INSTEAD if re.search(pattern, name))
    return f"ONNX has no operator for {name}{place}: {instead}."


def _name(program: torch.onnx.ONNXProgram, joint: Joint, *, frozen: bool) -> None:
    """Give inputs, outputs and free sizes their names, and make initializers of inputs that do not change.

    What the caller is to draw is in the metadata of the model: ``random.dropout``, by its distribution as JSON.
    """
    program.model.metadata_props.update({name: json.dumps(draw) for name, draw in joint.random_inputs.items()})
    name_ports(program, joint.inputs, joint.outputs, joint.axes)
    graph = program.model.graph
    constants = {*joint.constants, *(joint.values if frozen else ())}
    for value in [each for each in graph.inputs if each.name in constants]:
        assert value.name is not None
        tensor = joint.values[value.name].detach().cpu().contiguous()
        value.const_value = ir.tensor(tensor, name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
