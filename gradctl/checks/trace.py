"""``gradctl trace``: captures a static form, writes it, loads *the file* again and holds that against eager.

A file takes its place only if it verified; until then it lies in a folder of its own beside it, which is removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from gradctl.checks.allows import Allows
from gradctl.checks.compare import Comparing
from gradctl.checks.inspect_file import inspect_captured
from gradctl.core.errors import TargetError
from gradctl.core.findings import Unit
from gradctl.core.inspection import Inspection
from gradctl.forms import export
from gradctl.forms.artifact import load, place, save, written_beside
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.quiet import quiet
from gradctl.forms.table import form_named
from gradctl.subject.dynamic import Dynamic, by_leaf
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import borrowed_generators
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["FORMS_WITH_FILES", "Traced", "trace"]

FORMS_WITH_FILES = ("trace", "script", "export")


@dataclass(frozen=True, slots=True)
class Traced:
    """What became of one capture.

    Attributes:
        unit: the verdict on the file, against eager.
        graph: what the file holds; None where the form cannot take the model.
        written: whether the file is at its place now.
    """

    unit: Unit
    graph: Inspection | None
    written: bool


def trace(
    subject: Subject,
    output: Path,
    *,
    form: str = "trace",
    dynamic: Dynamic | None = None,
    keep_unverified: bool = False,
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Traced:
    """Return the verdict on the file that was written, read back and compared; see ``Traced.written``.

    Args:
        subject: the model and its inputs; not changed.
        output: where the file is to be.
        form: one of ``FORMS_WITH_FILES``.
        dynamic: sizes that stay free; for ``export``. The file is then tried at other sizes as well.
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
    with written_beside(output) as beside:
        with around(), borrowed_generators():
            comparing = Comparing(subject, accepted, fail_on=fail_on)
            try:
                say(f"capturing {form}")
                captured = _captured(form, comparing.reference.instance(), dynamic)
                loaded = _through_a_file(captured, beside)
            except CannotCapture as refusal:
                return Traced(_refused(subject, form, refusal, time.perf_counter() - start), None, written=False)
            graph = inspect_captured(loaded, str(output))
            say("comparing the file with eager")
            unit = comparing.captured(loaded, form_named(form), start=start)
            if dynamic and unit.verdict == "pass":
                unit = _at_other_sizes(unit, comparing, _read_back(captured, beside), dynamic)
        written = unit.verdict == "pass" or keep_unverified
        if written:
            place(beside, output)
    return Traced(unit, graph, written)


def _captured(form: str, instance: Instance, dynamic: Dynamic | None) -> Captured:
    with quiet():
        if dynamic:
            assert form == "export", "only torch.export leaves sizes free"
            return export.capture(instance, dynamic=dynamic)
        return form_named(form).capture(instance)


def _through_a_file(captured: Captured, path: Path) -> Captured:
    """Return what comes back from a file, which a refusal to be read makes a form that cannot take the model."""
    save(captured, path)
    try:
        return _read_back(captured, path)
    except TargetError as error:
        raise CannotCapture(f"torch saves the model, and cannot load it again: {error.message}") from error


def _read_back(captured: Captured, path: Path) -> Captured:
    return replace(load(path, trusted=True), form=captured.form, seconds=captured.seconds)


def _refused(subject: Subject, form: str, refusal: CannotCapture, seconds: float) -> Unit:
    return Unit(
        target=subject.target,
        form=form,
        status="unsupported",
        verdict="inconclusive",
        reason=refusal.reason,
        details=refusal.details or None,
        seconds=seconds,
    )


def _at_other_sizes(unit: Unit, before: Comparing, loaded: Captured, dynamic: Dynamic) -> Unit:
    """Return the unit with a comparison at sizes one larger; where that fails, it is the verdict."""
    sizes = dict.fromkeys(size for axes in dynamic.values() for size in axes.values())
    named = ", ".join(f"{size} + 1" for size in sizes)
    try:
        comparing = Comparing(_longer(before.subject, dynamic), before.allows, fail_on=before.fail_on)
    except TargetError as error:  # not every size is one that the model itself takes
        reason = f"not tried: {named} ({error.message.partition('. ')[0].rstrip('.')})"
        return msgspec.structs.replace(unit, reason="; ".join(part for part in (unit.reason, reason) if part))
    longer = comparing.captured(loaded, form_named(loaded.form))
    chosen = unit if longer.verdict == "pass" else longer
    return msgspec.structs.replace(
        chosen, variations=(*unit.variations, named), seconds=unit.seconds + longer.seconds, timing=unit.timing
    )


def _longer(subject: Subject, dynamic: Dynamic) -> Subject:
    """Return the subject with each free axis one longer, its last slice repeated."""
    args, kwargs = subject.args, subject.kwargs
    free = iter(_axes(subject, dynamic))

    def longer(_: str, leaf: object) -> object:
        axes: Mapping[int, str] = next(free)
        if not isinstance(leaf, Tensor):
            return leaf
        for axis in axes:
            leaf = torch.cat([leaf, leaf.narrow(axis, -1, 1)], axis)
        return leaf

    longer_args, longer_kwargs = map_leaves(longer, (args, kwargs))
    return replace(subject, args=longer_args, kwargs=longer_kwargs)


def _axes(subject: Subject, dynamic: Dynamic) -> list[Mapping[int, str]]:
    """Return the free axes of each leaf of the inputs, in order."""
    marked = by_leaf(subject.model, subject.args, subject.kwargs, dynamic, _Axes)
    return [leaf.axes if isinstance(leaf, _Axes) else {} for _, leaf in leaves(marked)]


class _Axes:
    """Free axes as a leaf, where a mapping would nest."""

    def __init__(self, axes: Mapping[int, str]) -> None:
        self.axes = axes
