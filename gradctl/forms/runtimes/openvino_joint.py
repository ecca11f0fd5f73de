"""OpenVINO, forward and backward: the file of the form ``onnx-joint``, run by OpenVINO."""

from __future__ import annotations

from gradctl.forms.form import Captured
from gradctl.forms.onnx.forward import run_from_file
from gradctl.forms.onnx.joint import export_graph, wrap_file
from gradctl.forms.runtimes import openvino_file
from gradctl.subject.instance import Instance

to_float64 = openvino_file.to_float64


def capture(instance: Instance) -> Captured:
    """Return forward and backward exported to one ONNX graph, and run from a file.

    Raises:
        CannotCapture: OpenVINO is not installed; tracing, the exporter, the checker or OpenVINO rejects the model.
    """
    openvino_file.import_openvino()
    return run_from_file(
        export_graph(instance), lambda file: wrap_file(file, instance, "openvino-joint", openvino_file.load)
    )
