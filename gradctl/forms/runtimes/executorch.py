"""ExecuTorch, forward: the program of the form ``export``, lowered to a ``.pte`` and run by ExecuTorch."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import torch
from torch import Tensor

from gradctl.forms.exported import export
from gradctl.forms.form import Captured
from gradctl.forms.onnx.forward import tensor_outputs
from gradctl.forms.onnx.from_file import ModelCall
from gradctl.forms.runtimes import executorch_program
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance

to_float64 = executorch_program.to_float64


def capture(instance: Instance) -> Captured:
    """Return the model exported on its own inputs and lowered; it has outputs only.

    Raises:
        CannotCapture: ExecuTorch is not installed; torch.export or ExecuTorch rejects the model.
    """
    executorch_program.import_executorch()
    start = perf_counter()
    outputs: list[str] = []
    exported = export.capture(instance, around=lambda module: tensor_outputs(module, outputs))
    method = executorch_program.lower(exported.artifact)
    seconds = perf_counter() - start
    inputs = [
        name for name, value in input_names(instance.subject.model, *instance.inputs()) if isinstance(value, Tensor)
    ]
    instance.restore()
    args, kwargs = instance.inputs()
    with torch.enable_grad():  # a model may compute gradients inside
        structure = instance.model(*args, **kwargs)
    instance.restore()

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(outputs, method([feeds[name] for name in inputs]), strict=True))

    return Captured(
        "executorch",
        ModelCall(
            run, instance.subject.model, {name: name for name in inputs}, {name: name for name in outputs}, structure
        ),
        # Their initial values are not in the file (executorch.exir.emit warns of it).
        buffers={name: torch.zeros_like(exported.buffers[name]) for name in method.changed},
        seconds=seconds,
        quantities=frozenset({"output"}),
        operators=exported.operators,
        artifact=exported.artifact,
        model=method,
    )
