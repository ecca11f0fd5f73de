"""Write a static form to a file: capture, save, load again, and compare *the file* with eager.

The file is staged in a temporary folder beside its target, and moved into place if the comparison passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from gradctl.commands.compare import Comparing, refused_unit
from gradctl.core.allows import Allows
from gradctl.core.errors import TargetError
from gradctl.core.findings import Unit
from gradctl.core.inspection import Inspection
from gradctl.core.names import WITHOUT_GRADIENTS
from gradctl.forms.artifact import place, staged_file
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.table import form_named
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject


@dataclass(frozen=True, slots=True)
class ArtifactFormat:
    """How one kind of file comes to be.

    Attributes:
        form: the form that it holds.
        capture: from a private copy of the model.
        save: to a path; the files that belong to it are written beside it.
        load: from that path, for a private copy.
        inspect: what was loaded, under the name that is given.
        wrt: names of the gradients that it has, as globs.
        outputs_suffice: whether a model without gradients is compared too, by its outputs.
    """

    form: str
    capture: Callable[[Instance], Captured]
    save: Callable[[Captured, Path], None]
    load: Callable[[Path, Instance], Captured]
    inspect: Callable[[Captured, str], Inspection]
    wrt: Sequence[str] = ("*",)
    outputs_suffice: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one capture.

    Attributes:
        unit: the verdict on the file, against eager.
        graph: what the file holds; None where the form cannot take the model.
        written: whether the file is at its place now.
    """

    unit: Unit
    graph: Inspection | None
    written: bool


def write(
    subject: Subject,
    output: Path,
    kind: ArtifactFormat,
    *,
    dynamic: Dynamic | None = None,
    keep_unverified: bool = False,
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Written:
    """Return the verdict on the file that was written, read back and compared; see ``Written.written``.

    Args:
        subject: the model and its inputs; not changed.
        output: where the file is to be.
        kind: of file.
        dynamic: sizes that ``kind`` leaves free: the file is tried at other sizes as well.
        keep_unverified: write it also where it did not verify.
        allows, fail_on, progress: as in ``gradcheck``.
        around: entered around all that runs the model.

    Raises:
        TargetError, NothingToCheck: as ``gradcheck``; GC104 for ``dynamic``.
        ResourceError: GC131 if the file cannot be written.
    """
    say = progress or (lambda text: None)
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    start = time.perf_counter()
    with staged_file(output) as beside:
        with around(), preserve_generators():
            say("step 1 of 3: running eager")
            outputs_only = kind.outputs_suffice or kind.form in WITHOUT_GRADIENTS
            comparing = Comparing(subject, accepted, fail_on=fail_on, outputs_only=outputs_only, wrt=kind.wrt)
            try:
                say(f"step 2 of 3: capturing {kind.form}")
                captured = kind.capture(comparing.reference.instance())
                kind.save(captured, beside)
                loaded = _read_back(kind, captured, beside, comparing)
            except CannotCapture as refusal:
                return Written(refused_unit(subject, kind.form, refusal, start), None, written=False)
            graph = kind.inspect(loaded, str(output))
            say("step 3 of 3: comparing the file with eager")
            unit = comparing.captured(loaded, form_named(kind.form), start=start)
            unit = comparing.at_other_sizes(unit, loaded, dynamic or {})
        written = unit.verdict == "pass" or keep_unverified
        if written:
            place(beside, output)
    return Written(unit, graph, written)


def _read_back(kind: ArtifactFormat, captured: Captured, path: Path, comparing: Comparing) -> Captured:
    """Return what comes back from a file, which a refusal to be read makes a form that cannot take the model."""
    try:
        loaded = kind.load(path, comparing.reference.instance())
    except TargetError as error:
        said = error.message.replace(str(path), "the file")
        raise CannotCapture(f"the model is captured and saved, and cannot be loaded again: {said}") from error
    return replace(loaded, form=kind.form, seconds=captured.seconds, reason=captured.reason)
