"""``gradctl export``: an ONNX graph of the forward, or of forward and backward, in a verified file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradctl.commands.capture_to_file import ArtifactFormat, Written, write
from gradctl.commands.trace import trace
from gradctl.forms.exported import export_joint as program
from gradctl.forms.onnx import forward as onnx
from gradctl.forms.onnx import joint as onnx_joint
from gradctl.forms.onnx.from_file import wrap_file
from gradctl.inspection.file_contents import inspect_captured, inspect_onnx
from gradctl.onnxio.onnx_file import read
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.loss_function import include_loss
from gradctl.subject.subject import Subject


def export(
    subject: Subject, output: Path, *, opset: int | None = None, dynamic: Dynamic | None = None, **options: Any
) -> Written:
    """Return the verdict on an ONNX file, as onnxruntime runs it, against eager's outputs; or on a ``.pt2``, as
    ``trace`` with the form export does.

    Args:
        subject, output, dynamic, options: as in ``write``; weights that do not fit into the file are in ``NAME.data``.
        opset: for ONNX, of ONNX's own operators; None leaves it to torch's exporter.

    Raises:
        TargetError, ResourceError: as ``write``.
    """
    if output.suffix.lower() == ".pt2":
        return trace(subject, output, form="export", dynamic=dynamic, outputs_suffice=True, **options)
    kind = ArtifactFormat(
        "onnx",
        lambda instance: onnx.export_graph(instance, opset=opset, dynamic=dynamic),
        lambda captured, path: onnx.save(captured.artifact, path),
        lambda path, instance: wrap_file(read(path), instance),
        lambda captured, name: inspect_onnx(captured.artifact, name),
    )
    return write(subject, output, kind, dynamic=dynamic, **options)


def export_joint(
    subject: Subject,
    output: Path,
    *,
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    frozen: bool = False,
    wrt: Sequence[str] = ("*",),
    **options: Any,
) -> Written:
    """Return the verdict on a file of forward and backward, ONNX or ``.pt2``, its gradients too against eager's.

    Args:
        subject: the model and its inputs; a loss goes into the graph. Not changed.
        output, opset, dynamic, options: as in ``export``.
        frozen: whether parameters are initializers, not inputs; of ONNX, as ``opset`` is.
        wrt: what to differentiate by, globs of ``param:fc1.weight`` and ``input:x``.

    Raises:
        TargetError, NothingToCheck, ResourceError: as ``write``.
    """
    if output.suffix.lower() == ".pt2":
        kind = ArtifactFormat(
            "export-joint",
            lambda instance: program.export_program(instance, dynamic=dynamic, wrt=wrt),
            program.save,
            program.load_file,
            inspect_captured,
            wrt,
        )
        return write(include_loss(subject), output, kind, dynamic=dynamic, **options)
    kind = ArtifactFormat(
        "onnx-joint",
        lambda instance: onnx_joint.export_graph(instance, opset=opset, dynamic=dynamic, frozen=frozen, wrt=wrt),
        lambda captured, path: onnx.save(captured.artifact, path),
        lambda path, instance: onnx_joint.wrap_file(read(path), instance),
        inspect_captured,
        wrt,
    )
    return write(include_loss(subject), output, kind, dynamic=dynamic, **options)
