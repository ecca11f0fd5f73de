"""ONNX, forward: exported by torch's dynamo exporter to a file, checked, and run by onnxruntime on the CPU.

Inputs have the names of the model (``x``, ``batch.mask``), outputs those of a report (``output``, ``output.logits``),
symbolic sizes those of ``--dynamic``, initializers those of their parameters.
"""

from __future__ import annotations

import importlib.util
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, OutputFixPass
from torch import Tensor, nn

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.names import output_name
from gradctl.forms.artifact import unwritable
from gradctl.forms.exported import export
from gradctl.forms.form import CannotCapture, Captured, not_called
from gradctl.forms.onnx.from_file import wrap_file
from gradctl.forms.reasons import innermost
from gradctl.forms.silence import silenced
from gradctl.joint.recurrent import ScannedLayers
from gradctl.onnxio.onnx_file import OnnxFile, read
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.tree import leaves

# Protobuf allows 2 GiB, of which 128 MiB are left for all but the weights.
_LARGEST = 2**31 - 2**27


def capture(instance: Instance) -> Captured:
    """Return the model exported to ONNX on its own inputs, and run from a file; it has outputs only.

    Raises:
        CannotCapture: the exporter, the checker or onnxruntime rejects the model.
    """
    return run_from_file(export_graph(instance), lambda file: wrap_file(file, instance))


def run_from_file(captured: Captured, load: Callable[[OnnxFile], Captured]) -> Captured:
    """Return the form that ``load`` returns for a graph in memory after it is saved to a file.

    Raises:
        CannotCapture: the checker or onnxruntime rejects the file.
    """
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "model.onnx"
        save(captured.artifact, path)
        try:
            loaded = load(read(path))
        except TargetError as error:
            said = error.message.replace(str(path), "the exported file")
            raise CannotCapture(f"the model is exported, and {said}", traceback.format_exc()) from error
    return replace(loaded, seconds=captured.seconds, reason=captured.reason)


def export_graph(instance: Instance, *, opset: int | None = None, dynamic: Dynamic | None = None) -> Captured:
    """Return the model as an ONNX graph in memory, a form that cannot be called yet; its artifact is an ``ir.Model``.

    Args:
        instance: the private copy.
        opset: of ONNX's own operators; None for the exporter's default.
        dynamic: symbolic sizes, by input and axis; all others are fixed to those of the inputs.

    Raises:
        CannotCapture: the exporter rejects the model, or has no conversion to this opset.
        TargetError: GC104 if ``dynamic`` names an unknown input or axis.
    """
    start = perf_counter()
    # torch.onnx rejects dataclasses, None and numbers among the outputs; the caller knows them from eager.
    outputs: list[str] = []

    def around(module: nn.Module) -> AbstractContextManager[None]:
        return tensor_outputs(module, outputs)

    def graph_of(captured: Captured) -> ir.Model:
        return convert(
            captured.artifact,
            opset,
            lambda found: _name(found, outputs, instance, dynamic or {}),
            lambda error: f"torch.onnx refuses the model: {first_line(error)}",
        )

    with _symbolic_steps() if dynamic else nullcontext():
        captured = export.capture(instance, dynamic=dynamic, around=around)
        try:
            model = graph_of(captured)
        except CannotCapture as refusal:
            if captured.reason:
                raise
            captured = export.capture_differentiated(instance, refusal, dynamic=dynamic, around=around)
            model = graph_of(captured)
    return Captured(
        "onnx",
        not_called,
        seconds=perf_counter() - start,
        quantities=frozenset({"output"}),
        artifact=model,
        reason=captured.reason,
    )


def convert(
    program: torch.export.ExportedProgram,
    opset: int | None,
    name: Callable[[torch.onnx.ONNXProgram], None],
    refusal: Callable[[BaseException], str],
    optimize: Callable[[torch.onnx.ONNXProgram], None] = torch.onnx.ONNXProgram.optimize,
) -> ir.Model:
    """Return an exported program as an optimised ONNX graph.

    Args:
        program: the input of torch.onnx's exporter.
        opset: of ONNX's own operators; None for the exporter's default.
        name: names inputs and outputs, before the graph is optimised.
        refusal: returns the message for an error of the exporter.
        optimize: optimises the graph.

    Raises:
        CannotCapture: the exporter rejects the program, or has no conversion to this opset.
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
        raise CannotCapture(f"the exporter produces opset {given} and cannot convert it to opset {opset}.")
    return model


def name_ports(
    program: torch.onnx.ONNXProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Name the inputs and outputs of a graph, in order, and the symbolic axes of inputs."""
    graph = program.model.graph
    sizes: dict[str | ir.SymbolicDim, str] = {}
    for name, value in zip(inputs, graph.inputs, strict=True):
        for axis, size in axes.get(name, {}).items():
            free = value.shape[axis] if value.shape is not None else None
            if isinstance(free, ir.SymbolicDim):
                sizes[free] = size
    program.rename_axes(sizes)
    OutputFixPass()(program.model)  # gives an output that is an input, or another output, a name of its own
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    NameFixPass()(program.model)  # renames a parameter of the same name


def save(model: ir.Model, path: Path) -> None:
    """Write a graph; if it is too large for one file, its weights go to a second one next to it, ``NAME.data``.

    Raises:
        ResourceError: GC131 if the file cannot be written.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if weights > _LARGEST else None)
    except OSError as error:
        raise unwritable(path, error) from error


def initial_values(instance: Instance) -> dict[str, Tensor]:
    """Return the initializers of a new export, as the exporter folds them; empty if it rejects the model."""
    try:
        model = export_graph(instance).artifact
    except CannotCapture:
        return {}
    values: dict[str, Tensor] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            with suppress(TypeError):  # a type that torch cannot convert from numpy
                values[name] = torch.from_numpy(value.const_value.numpy())
    return values


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Raise: onnxruntime has no float64 kernels for Conv, Erf and others.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture(
        "onnxruntime has no float64 kernels for many operators; outputs are compared in the model's own dtype."
    )


@contextmanager
def _symbolic_steps() -> Iterator[None]:
    """Keep the number of steps of recurrent layers symbolic in the capture, as torch.onnx does, and in the conversion.

    There torch.onnx fixes it in the types of the graph; and it unrolls RNN (torch 2.13).
    """
    # torch 2.10 has neither, and torch.onnx fixes the number of steps there.
    found = importlib.util.find_spec("torch.export._patches") and importlib.import_module("torch.export._patches")
    with ExitStack() as stack:
        for layer in ("gru", "lstm"):
            stack.enter_context(getattr(found, f"register_{layer}_while_loop_decomposition", nullcontext)())
        stack.enter_context(ScannedLayers([torch.rnn_tanh, torch.rnn_relu]))
        yield


@contextmanager
def tensor_outputs(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Make a module return its output tensors as a tuple; a call puts their names in the list."""

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
    """Name inputs, outputs and symbolic sizes as the user does."""
    graph = program.model.graph
    leaves_in = input_names(instance.subject.model, *instance.inputs())
    inputs = [name for name, value in leaves_in if isinstance(value, Tensor)]
    _check_count("inputs", graph.inputs, inputs)
    _check_count("outputs", graph.outputs, outputs)
    name_ports(program, inputs, outputs, dynamic)


def _check_count(kind: str, values: Sequence[ir.Value], names: list[str]) -> None:
    if len(values) != len(names):
        raise CannotCapture(f"the ONNX graph has {len(values)} {kind} where the model has {len(names)} tensors.")
