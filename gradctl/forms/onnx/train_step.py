"""A whole training step in one ONNX graph: loss, gradients, optimizer, new state. Any ONNX runtime executes it.

Its inputs are the trained parameters (``fc1.weight``), the buffers that the forward changes, the state of the optimizer
(``exp_avg.fc1.weight``), ``step`` (how many steps were made), ``learning_rate``, the batch (``input.x``) and the random
numbers of the model (``random.dropout``). Its outputs are ``loss`` and, for each parameter, buffer and state, its next
value ``next.NAME``; the gradients ``grad.NAME`` if they are asked for. All other weights are initializers.

Beside the file, ``NAME.safetensors`` has the first value of each input, the batch that of the example. Both files have
the metadata ``train_step``, which is JSON (onnxruntime-web does not show the metadata of an ONNX file): ``feeds`` says
which output is which input of the next step, ``batch`` names the inputs that the caller provides, ``random`` those that
the caller draws, with their distributions, and ``optimizer`` has the hyperparameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import safetensors.torch
from torch import Tensor

from gradctl.forms.artifact import unwritable
from gradctl.forms.form import Captured
from gradctl.forms.onnx.forward import save as save_graph
from gradctl.forms.onnx.joint import export_graph as export_joint_graph
from gradctl.joint.optimizer_update import NEXT, OptimizerUpdate
from gradctl.subject.instance import Instance

METADATA = "train_step"
_VALUES = ".safetensors"


def export_graph(instance: Instance, update: OptimizerUpdate, **options: Any) -> Captured:
    """Return the training step as a form that cannot be called; its artifact is an ``ir.Model`` with its metadata.

    Args:
        instance: the private copy, whose output is the loss of ``update``.
        update: the step of the optimizer.
        options: ``opset`` and ``dynamic``, as of the joint graph.

    Raises:
        CannotCapture, TargetError: as for the joint graph.
    """
    captured = export_joint_graph(instance, update=update, **options)
    model: ir.Model = captured.artifact
    outputs = [each.name or "" for each in model.graph.outputs]
    inputs = [each.name or "" for each in model.graph.inputs]
    random = {name: json.loads(model.metadata_props.pop(name)) for name in inputs if name in model.metadata_props}
    described = {
        "schema_version": 1,
        "feeds": {name: name.removeprefix(NEXT) for name in outputs if name.startswith(NEXT)},
        "batch": [name for name in inputs if name.startswith("input.")],
        "random": random,
        "optimizer": {"groups": [{"parameters": each.names, **_json_options(each.options)} for each in update.groups]},
    }
    model.metadata_props[METADATA] = json.dumps(described)
    return captured


def save(captured: Captured, path: Path, values: Mapping[str, Tensor]) -> None:
    """Write the graph, and beside it ``NAME.safetensors`` with the first value of each input.

    Args:
        captured: the result of ``export_graph``.
        path: of the ONNX file.
        values: by name; those that are no inputs are not written.

    Raises:
        ResourceError: GC131 if a file cannot be written.
    """
    model: ir.Model = captured.artifact
    names = {each.name for each in model.graph.inputs}
    first = {name: value.detach().cpu().contiguous().clone() for name, value in values.items() if name in names}
    save_graph(model, path)
    beside = path.with_suffix(_VALUES)
    try:
        beside.write_bytes(safetensors.torch.save(first, {METADATA: model.metadata_props[METADATA]}))
    except OSError as error:
        raise unwritable(beside, error) from error


def _json_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if isinstance(value, int | float | str | list | tuple)}
