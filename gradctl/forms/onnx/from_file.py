"""An ONNX file as a form: called with the inputs of its model, with outputs in the same structure."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.names import output_name
from gradctl.forms.form import Captured, named_tensors
from gradctl.onnxio.onnx_file import OnnxFile, initializers
from gradctl.onnxio.session import Run, as_numpy, describe_port, load, port_text
from gradctl.onnxio.validation import nodes
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves


def wrap_file(
    file: OnnxFile, instance: Instance, form: str = "onnx", load_in: Callable[[OnnxFile], Run] | None = None
) -> Captured:
    """Return an ONNX file as a form of a model. Inputs and outputs are matched by name, or else by their order.

    Initializers with the name and shape of a parameter or buffer correspond to it; others, which an optimiser may have
    folded, correspond to none.

    Args:
        file: the file.
        instance: a private copy of the model; it is called once.
        form: the name of the form.
        load_in: loads the file in another runtime than onnxruntime.

    Raises:
        TargetError: GC141 if inputs, outputs or initializers are not those of the model; GC602 if it does not run.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    given = _tensors(input_names(instance.subject.model, args, kwargs))
    with torch.enable_grad():  # a model may compute gradients inside
        structure = instance.model(*args, **kwargs)
    instance.restore()
    outputs = {output_name(path): leaf for path, leaf in leaves(structure) if isinstance(leaf, Tensor)}
    differing: list[str] = []
    feeds = _match_ports("input", file.inputs, given, differing)
    results = _match_ports("output", list(file.model.graph.output), outputs, differing)
    parameters, buffers = _values(file, instance, differing)
    if differing:
        raise TargetError("GC141", f"{file.path} is not a form of {instance.subject.target}: {'; '.join(differing)}.")
    running = load_in(file) if load_in is not None else load(file, instance.subject.provider)
    call = ModelCall(running, instance.subject.model, feeds, results, structure)
    operators = dict(Counter(node.op_type for node in nodes(file.model)).most_common())
    return Captured(
        form, call, parameters, buffers, quantities=frozenset({"output"}), operators=operators, artifact=file
    )


def free_sizes(captured: Captured) -> dict[str, dict[int, str]]:
    """Return the symbolic sizes of the file of a form, by input of the model and axis."""
    assert isinstance(captured.call, ModelCall)
    free: dict[str, dict[int, str]] = {}
    for port in captured.artifact.inputs:
        for axis, size in enumerate(port.type.tensor_type.shape.dim):
            if size.dim_param:
                free.setdefault(captured.call.feeds[port.name], {})[axis] = size.dim_param
    return free


def without_optimizer(captured: Captured, provider: str | None = None) -> Captured:
    """Return the form of a file, run by onnxruntime without its graph optimiser.

    Raises:
        TargetError: GC602 if it does not run without it: an operator that only the optimiser removes.
    """
    call = captured.call
    assert isinstance(call, ModelCall)
    file: OnnxFile = captured.artifact
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        if not file.path.exists():  # a file that this run exported is in memory only
            file = replace(file, path=Path(folder) / "model.onnx")
            onnx.save(file.model, file.path)
        plain = load(file, provider, optimised=False)
    return replace(captured, call=replace(call, run=plain))


@dataclass(frozen=True, slots=True, eq=False)
class ModelCall:
    """A runtime as a callable with the inputs and outputs of a model."""

    run: Run
    model: Callable[..., Any]  # its parameters name the inputs
    feeds: Mapping[str, str]  # the model's input name by that of the runtime
    results: Mapping[str, str]  # the model's output name by that of the runtime
    structure: Any  # an output of the model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of one run, each on the device of the model's output."""
        found = self.run(self._given(args, kwargs))
        named = {self.results[name]: value for name, value in found.items()}

        def replaced(path: str, leaf: Any) -> Any:
            return named[output_name(path)].to(leaf.device) if isinstance(leaf, Tensor) else leaf

        return map_leaves(replaced, self.structure)

    def feeds_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Return the feeds of onnxruntime for these inputs of the model."""
        return {name: as_numpy(tensor) for name, tensor in self._given(args, kwargs).items()}

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        given = _tensors(input_names(self.model, args, kwargs))
        return {name: given[leaf] for name, leaf in self.feeds.items()}


def _match_ports(
    kind: str, ports: list[onnx.ValueInfoProto], tensors: Mapping[str, Tensor], differing: list[str]
) -> dict[str, str]:
    """Return the model's name for each port: the same one, or ``input:`` before it, or else the next in order."""
    by_name = {port.name: port.name.removeprefix("input:") for port in ports}
    if not set(by_name.values()) <= tensors.keys() or (kind == "output" and len(ports) != len(tensors)):
        if len(ports) != len(tensors):
            names, known = ", ".join(by_name) or "none", ", ".join(tensors) or "none"
            differing.append(f"{len(ports)} {kind}s ({names}), and the model has {len(tensors)} ({known})")
            return {}
        by_name = dict(zip(by_name, tensors, strict=True))
    for port in ports:
        (dtype, sizes), tensor = describe_port(port), tensors[by_name[port.name]]
        own = str(tensor.dtype).removeprefix("torch.")
        if dtype != own or not _is_shape(sizes, tensor):
            differing.append(f"{kind} {port.name} is {port_text(port)}, not {own}{list(tensor.shape)}")
    return by_name


def _is_shape(sizes: list[int | str] | None, tensor: Tensor) -> bool:
    return sizes is None or (
        len(sizes) == tensor.ndim
        and all(isinstance(size, str) or size == own for size, own in zip(sizes, tensor.shape, strict=True))
    )


def _values(file: OnnxFile, instance: Instance, differing: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the initializers that correspond to parameters and to buffers."""
    parameters, buffers = named_tensors(module_of(instance.model))
    own = {**parameters, **buffers}
    found: dict[str, Tensor] = {}
    for name, value in initializers(file):
        reference = own.get(name)
        if reference is None:
            continue
        if value.shape != reference.shape:
            differing.append(f"{name} has shape {list(value.shape)}, not {list(reference.shape)}")
        elif value.dtype == reference.dtype:  # a file has one name of a tied tensor
            found |= {other: value for other, tensor in own.items() if tensor is reference}
    of_parameters, of_buffers = ({n: found[n] for n in names if n in found} for names in (parameters, buffers))
    return of_parameters, of_buffers


def _tensors(named: list[tuple[str, Any]]) -> dict[str, Tensor]:
    return {name: value for name, value in named if isinstance(value, Tensor)}
