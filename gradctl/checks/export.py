"""``gradctl export``: an ONNX graph of the forward in a verified file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradctl.checks.inspect_file import inspect_onnx
from gradctl.checks.written import Kind, Written, write
from gradctl.forms import onnx
from gradctl.forms.onnx_file import read
from gradctl.forms.onnx_session import of_file
from gradctl.subject.dynamic import Dynamic
from gradctl.subject.subject import Subject

__all__ = ["export"]


def export(
    subject: Subject, output: Path, *, opset: int | None = None, dynamic: Dynamic | None = None, **options: Any
) -> Written:
    """Return the verdict on an ONNX file, as onnxruntime runs it, against eager's outputs.

    Args:
        subject: the model and its inputs; not changed.
        output: where the file is to be; weights that do not fit into it are put beside it, as ``NAME.data``.
        opset: of ONNX's own operators; None leaves it to torch's exporter.
        dynamic: sizes that stay free.
        options: as in ``write``.

    Raises:
        TargetError, ResourceError: as ``write``.
    """
    kind = Kind(
        "onnx",
        lambda instance: onnx.exported(instance, opset=opset, dynamic=dynamic),
        lambda captured, path: onnx.save(captured.artifact, path),
        lambda path, instance: of_file(read(path), instance),
        lambda captured, name: inspect_onnx(captured.artifact, name),
    )
    return write(subject, output, kind, dynamic=dynamic, **options)
