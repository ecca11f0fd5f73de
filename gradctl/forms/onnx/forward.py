"""ONNX, forward: exported by torch's dynamo exporter to a file, checked, and run by onnxruntime on the CPU.

Inputs are named as the model's own (``x``, ``batch.mask``), outputs as in a report (``output``, ``output.logits``),
free sizes as ``--dynamic`` names them, initializers by their parameters.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, OutputFixPass
from torch import Tensor, nn

from gradctl.core.errors import TargetError
from gradctl.core.names import output_name
from gradctl.forms.artifact import unwritable
from gradctl.forms.exported import export
from gradctl.forms.form import CannotCapture, Captured, not_called
from gradctl.forms.onnx.from_file import of_file
from gradctl.forms.reasons import innermost
from gradctl.forms.silence import silenced
from gradctl.onnxio.onnx_file import OnnxFile, read
from gradctl.subject.frames import first_line, is_out_of_memory
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.tree import leaves

__all__ = ["by_file", "capture", "converted", "exported", "initial_values", "name_ports", "save", "to_float64"]

# Protobuf takes 2 GiB; what is not weights needs room too.
_LARGEST = 2**31 - 2**27


def capture(instance: Instance) -> Captured:
    """Return the model exported to ONNX on its own inputs, and run from a file; it gives outputs only.

    Raises:
        CannotCapture: the exporter, the checker or onnxruntime refuses the model.
    """
    return by_file(exported(instance), lambda file: of_file(file, instance))


def by_file(captured: Captured, load: Callable[[OnnxFile], Captured]) -> Captured:
    """Return what ``load`` makes of a graph in memory once it is a file, which is what is run.

    Raises:
        CannotCapture: the checker or onnxruntime refuses the file.
    """
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "model.onnx"
        save(captured.artifact, path)
        try:
            loaded = load(read(path))
        except TargetError as error:
            said = error.message.replace(str(path), "the exported file")
            raise CannotCapture(f"the model is exported, and {said}", traceback.format_exc()) from error
    return replace(loaded, seconds=captured.seconds)


def exported(instance: Instance, *, opset: int | None = None, dynamic: Dynamic | None = None) -> Captured:
    """Return the model as an ONNX graph in memory: a form that cannot be called yet, its artifact an ``ir.Model``.

    Args:
        instance: the private copy.
        opset: of ONNX's own operators; None leaves it to the exporter.
        dynamic: sizes that stay free, by input and axis; all others are fixed to those of the inputs.

    Raises:
        CannotCapture: the exporter refuses the model, or has no conversion to this opset.
        TargetError: GC104 if ``dynamic`` names an input or an axis that is not there.
    """
    start = perf_counter()
    # torch.onnx takes no dataclass, None or number among the outputs; which there are, the caller knows from eager.
    outputs: list[str] = []
    program = export.capture(
        instance, dynamic=dynamic, around=lambda module: _only_tensors_out(module, outputs)
    ).artifact
    model = converted(
        program,
        opset,
        lambda found: _name(found, outputs, instance, dynamic or {}),
        lambda error: f"torch.onnx refuses the model: {first_line(error)}",
    )
    return Captured(
        "onnx", not_called, seconds=perf_counter() - start, quantities=frozenset({"output"}), artifact=model
    )


def converted(
    program: torch.export.ExportedProgram,
    opset: int | None,
    name: Callable[[torch.onnx.ONNXProgram], None],
    refusal: Callable[[BaseException], str],
    optimize: Callable[[torch.onnx.ONNXProgram], None] = torch.onnx.ONNXProgram.optimize,
) -> ir.Model:
    """Return an exported program as an optimised ONNX graph.

    Args:
        program: what torch.onnx's exporter takes.
        opset: of ONNX's own operators; None leaves it to the exporter.
        name: gives inputs and outputs their names, before anything is optimised.
        refusal: what to say of what the exporter raises.
        optimize: what is done with the graph once it has its names.

    Raises:
        CannotCapture: the exporter refuses the program, or has no conversion to this opset.
    """
    try:
        with silenced():
            found = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
            assert found is not None
            name(found)
            optimize(found)
    except CannotCapture:
        raise
    except Exception as error:  # the exporter may raise anything
        if is_out_of_memory(error):
            raise
        raise CannotCapture(refusal(innermost(error)), traceback.format_exc()) from error
    model: ir.Model = found.model
    given = model.opset_imports.get("")
    if opset is not None and given != opset:
        raise CannotCapture(f"the exporter gives opset {given} and cannot turn it into opset {opset}.")
    return model


def name_ports(
    program: torch.onnx.ONNXProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Give the inputs and outputs of a graph their names, in their order, and free axes of inputs theirs."""
    graph = program.model.graph
    sizes: dict[str | ir.SymbolicDim, str] = {}
    for name, value in zip(inputs, graph.inputs, strict=True):
        for axis, size in axes.get(name, {}).items():
            free = value.shape[axis] if value.shape is not None else None
            if isinstance(free, ir.SymbolicDim):
                sizes[free] = size
    program.rename_axes(sizes)
    OutputFixPass()(program.model)  # an output that is an input, or another output, gets a name of its own
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    NameFixPass()(program.model)  # a parameter of the same name gives way


def save(model: ir.Model, path: Path) -> None:
    """Write a graph; one too large for one file gets its weights in a second one beside it, ``NAME.data``.

    Raises:
        ResourceError: GC131 if the disk refuses.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if weights > _LARGEST else None)
    except OSError as error:
        raise unwritable(path, error) from error


def initial_values(instance: Instance) -> dict[str, Tensor]:
    """Return the initializers of a new export, as the exporter folds them; nothing where it refuses the model."""
    try:
        model = exported(instance).artifact
    except CannotCapture:
        return {}
    values: dict[str, Tensor] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            with suppress(TypeError):  # a type that torch does not take from numpy
                values[name] = torch.from_numpy(value.const_value.numpy())
    return values


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Refuse: onnxruntime has no float64 kernels for Conv, Erf and others.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture(
        "onnxruntime has no float64 kernels for many operators; outputs are judged in the native dtype."
    )


@contextmanager
def _only_tensors_out(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Let a module give its output tensors in a tuple; their names are in the list once it was called."""

    def tensors_of(_module: nn.Module, _inputs: Any, value: Any) -> tuple[Tensor, ...]:
        found = [(output_name(path), leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]
        names[:] = [name for name, _ in found]
        return tuple(leaf for _, leaf in found)

    hook = module.register_forward_hook(tensors_of)
    try:
        yield
    finally:
        hook.remove()


def _name(program: torch.onnx.ONNXProgram, outputs: list[str], instance: Instance, dynamic: Dynamic) -> None:
    """Give inputs, outputs and free sizes the names that the user knows them by."""
    graph = program.model.graph
    leaves_in = input_names(instance.subject.model, *instance.inputs())
    inputs = [name for name, value in leaves_in if isinstance(value, Tensor)]
    _check_count("inputs", graph.inputs, inputs)
    _check_count("outputs", graph.outputs, outputs)
    name_ports(program, inputs, outputs, dynamic)


def _check_count(kind: str, values: Sequence[ir.Value], names: list[str]) -> None:
    if len(values) != len(names):
        raise CannotCapture(f"the ONNX graph has {len(values)} {kind} where the model has {len(names)} tensors.")
