"""``gradctl export --graph jvp|hvp``: outputs and directional derivatives in a verified file.

Eager's own derivatives are checked first: the JVP must be the transpose of its VJP, the HVP the derivative of its
gradient by finite differences. Then the file is compared with eager like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from gradctl.commands.capture_to_file import ArtifactFormat, Written, write
from gradctl.commands.compare import refused_unit, silenced_run
from gradctl.core.allows import Allows
from gradctl.forms.exported import export_joint as program
from gradctl.forms.form import CannotCapture
from gradctl.forms.onnx import forward as onnx
from gradctl.forms.onnx import joint as onnx_joint
from gradctl.gradients.directional.products import CannotDifferentiate, check_directional
from gradctl.inspection.file_contents import inspect_captured
from gradctl.joint.derivatives import TANGENT, derivative_subject
from gradctl.onnxio.onnx_file import read
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.loss_function import include_loss
from gradctl.subject.subject import Subject


def export_derivative(
    subject: Subject,
    output: Path,
    *,
    graph: str,
    wrt: Sequence[str] = (),
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    frozen: bool = False,
    keep_unverified: bool = False,
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    **options: Any,
) -> Written:
    """Return the verdict on a file with directional derivatives, ONNX or ``.pt2``.

    Args:
        subject: the model and its inputs; a loss goes into the graph. Not changed.
        output, opset, dynamic, frozen, options: as in ``export_joint``.
        keep_unverified, allows, fail_on, progress, around: as in ``write``.
        graph: ``jvp`` or ``hvp``.
        wrt: what to differentiate by, globs of ``param:fc1.weight`` and ``input:x``; all float inputs if empty.

    Raises:
        TargetError, ResourceError: as ``write`` and ``derivative_subject``.
    """
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    with_loss = include_loss(subject)
    derived = derivative_subject(with_loss, graph, wrt)
    if progress is not None:
        progress(f"checking the {graph} of eager")
    start = time.perf_counter()
    try:
        with around(), silenced_run():
            eager = check_directional(with_loss, graph, wrt, allows=accepted, fail_on=fail_on)
    except CannotDifferentiate as error:
        return Written(refused_unit(subject, f"onnx-{graph}", CannotCapture(str(error)), start), None, written=False)
    if eager.verdict != "pass" and not keep_unverified:
        return Written(eager, None, written=False)
    free = dict(dynamic or {})
    free |= {
        f"{TANGENT}.input.{name}": axes for name, axes in free.items() if f"input.{name}" in derived.kwargs[TANGENT]
    }
    if output.suffix.lower() == ".pt2":
        form = "export"
        kind = ArtifactFormat(
            "export-joint",
            lambda instance: program.export_program(instance, dynamic=free, wrt=()),
            program.save,
            program.load_file,
            inspect_captured,
        )
    else:
        form = "onnx"
        kind = ArtifactFormat(
            "onnx-joint",
            lambda instance: onnx_joint.export_graph(instance, opset=opset, dynamic=free, frozen=frozen, wrt=()),
            lambda captured, path: onnx.save(captured.artifact, path),
            lambda path, instance: onnx_joint.wrap_file(read(path), instance),
            inspect_captured,
        )
    kind = replace(kind, wrt=(), outputs_suffice=True)
    written = write(
        derived,
        output,
        kind,
        dynamic=free,
        keep_unverified=keep_unverified,
        allows=accepted,
        fail_on=fail_on,
        progress=progress,
        around=around,
        **options,
    )
    findings = (*eager.findings, *written.unit.findings)
    return replace(written, unit=msgspec.structs.replace(written.unit, form=f"{form}-{graph}", findings=findings))
