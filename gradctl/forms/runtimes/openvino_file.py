"""ONNX files in OpenVINO, on the CPU, in float32.

By default OpenVINO computes float32 in bfloat16 on a processor that has it (AVX512_BF16, AMX): two layers of 256 units
then have a relative error of 3.1e-3 (2026.4), and 3.4e-7 with the precision hint that is set here, as eager (2.4e-7).
The same hint computes float16 in float32. float64 is computed in float32 (3.4e-7), and integers of 64 bits in 32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.runtimes.package import import_package
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.session import Run, as_numpy
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance

# The lines of a message that name functions of OpenVINO's own.
_FRAMES = re.compile(
    r"(Exception from|Check '|FrontEnd API|Model wasn't|Summary|While validating|-- \S+ with a message)"
)


def import_openvino() -> ModuleType:
    """Return the package.

    Raises:
        CannotCapture: it is not installed, or cannot be imported.
    """
    return import_package("openvino", "openvino")


def load(file: OnnxFile) -> Run:
    """Return a file compiled by OpenVINO for the CPU, with torch's number of threads.

    Raises:
        CannotCapture: OpenVINO is not installed.
        TargetError: GC602 if OpenVINO cannot run the file, or not in the dtype of its inputs and outputs.
    """
    openvino = import_openvino()
    ports = [*file.inputs, *file.model.graph.output]
    double = next((each.name for each in ports if each.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE), None)
    if double is not None:
        said = f"{double!r} is float64, which it computes in float32 on the CPU. Use a float32 model"
        raise _refusal(file, openvino, said)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        compiled = openvino.Core().compile_model(file.path, "CPU", settings)
    except Exception as error:  # bindings of C++ may raise anything
        if is_out_of_memory(error):
            raise
        raise _refusal(file, openvino, _message(error)) from error
    inputs = [each.name for each in file.inputs]
    outputs = [each.name for each in file.model.graph.output]
    if (len(compiled.inputs), len(compiled.outputs)) != (len(inputs), len(outputs)):
        said = f"it has {len(compiled.inputs)} inputs and {len(compiled.outputs)} outputs there"
        raise _refusal(file, openvino, f"{said}, not {len(inputs)} and {len(outputs)}")

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            found = compiled([as_numpy(feeds[name]) for name in inputs])
        except Exception as error:
            raise RuntimeError(f"OpenVINO: {_message(error)}") from error
        # The arrays belong to the request, which writes them again in the next run.
        return {name: torch.from_numpy(np.array(found[number])) for number, name in enumerate(outputs)}

    return run


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Raise: OpenVINO computes float64 in float32.

    Raises:
        CannotCapture: always.
    """
    raise CannotCapture("OpenVINO computes float64 in float32; the form is compared in the model's own dtype.")


def _refusal(file: OnnxFile, openvino: Any, said: str) -> TargetError:
    version = openvino.__version__.partition("-")[0]
    return TargetError("GC602", f"{file.path} cannot be run by OpenVINO {version}: {said}.")


def _message(error: Exception) -> str:
    """Return the first line of an error that is not about OpenVINO's own functions."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = next((line for line in lines if line and not _FRAMES.match(line)), "") or first_line(error)
    return said.removeprefix("-- ").rstrip(".")
