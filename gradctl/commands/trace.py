"""``gradctl trace``: TorchScript or an exported program in a verified file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradctl.commands.capture_to_file import ArtifactFormat, Written, write
from gradctl.forms.artifact import load, save
from gradctl.forms.exported import export
from gradctl.forms.form import Captured
from gradctl.forms.silence import silenced
from gradctl.forms.table import form_named
from gradctl.inspection.file_contents import inspect_captured
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject

FORMS_WITH_FILES = ("trace", "script", "export")


def trace(
    subject: Subject,
    output: Path,
    *,
    form: str = "trace",
    dynamic: Dynamic | None = None,
    outputs_suffice: bool = False,
    **options: Any,
) -> Written:
    """Return the verdict on the file of a form.

    Args:
        subject: the model and its inputs; not changed.
        output: where the file is to be.
        form: one of ``FORMS_WITH_FILES``.
        dynamic: sizes that stay free; for ``export``.
        outputs_suffice: whether a model without gradients is compared too, by its outputs.
        options: as in ``write``.

    Raises:
        TargetError, NothingToCheck, ResourceError: as ``write``.
    """

    def capture(instance: Instance) -> Captured:
        with silenced():
            return export.capture(instance, dynamic=dynamic) if dynamic else form_named(form).capture(instance)

    kind = ArtifactFormat(
        form,
        capture,
        save,
        lambda path, _instance: load(path, trusted=True),
        inspect_captured,
        outputs_suffice=outputs_suffice,
    )
    return write(subject, output, kind, dynamic=dynamic, **options)
