"""ExecuTorch, forward and backward: the ``.pt2`` of the form ``export-joint``, lowered and run by ExecuTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from torch import Tensor

from gradctl.forms.exported import export_joint
from gradctl.forms.exported.export import count_operators
from gradctl.forms.form import Captured
from gradctl.forms.joint_call import JointRuntime, wrap_runtime
from gradctl.forms.runtimes import executorch_program
from gradctl.subject.instance import Instance

to_float64 = executorch_program.to_float64


def capture(instance: Instance) -> Captured:
    """Return forward and backward as one program, saved, loaded again and lowered.

    Raises:
        CannotCapture: ExecuTorch is not installed; the model cannot be traced; torch or ExecuTorch rejects the program.
    """
    executorch_program.import_executorch()
    start = perf_counter()
    captured = export_joint.export_program(instance)
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "joint.pt2"
        export_joint.save(captured, path)
        names, program = export_joint.read(path)
    method = executorch_program.lower(program)

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(names.outputs, method([feeds[name] for name in names.inputs]), strict=True))

    return wrap_runtime(
        "executorch-joint",
        JointRuntime(names.inputs, names.outputs, run),
        instance,
        "the program",
        operators=count_operators(program),
        artifact=program,
        seconds=perf_counter() - start,
    )
