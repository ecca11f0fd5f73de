"""OpenVINO, forward: the file of the form ``onnx``, run by OpenVINO."""

from __future__ import annotations

from gradctl.forms.form import Captured
from gradctl.forms.onnx.forward import export_graph, run_from_file
from gradctl.forms.onnx.from_file import wrap_file
from gradctl.forms.runtimes import openvino_file
from gradctl.subject.instance import Instance

to_float64 = openvino_file.to_float64


def capture(instance: Instance) -> Captured:
    """Return the model exported to ONNX on its own inputs, and run from a file; it has outputs only.

    Raises:
        CannotCapture: OpenVINO is not installed; the exporter, the checker or OpenVINO rejects the model.
    """
    openvino_file.import_openvino()
    return run_from_file(export_graph(instance), lambda file: wrap_file(file, instance, "openvino", openvino_file.load))
