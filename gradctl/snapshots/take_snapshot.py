"""``gradctl snapshot``: record the outputs, gradients and buffer updates of a model, with the values it starts from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gradctl.comparison.difference import Key
from gradctl.core.errors import TargetError, listed
from gradctl.core.findings import Finding
from gradctl.core.names import Quantity
from gradctl.core.numbers import format_number
from gradctl.core.target_files import parse_target
from gradctl.core.target_options import TargetOptions
from gradctl.gradients.baseline import run_native
from gradctl.snapshots.conditions import environment, generators
from gradctl.snapshots.snapshot_file import (
    SCHEMA_VERSION,
    Header,
    LoadOptions,
    Precision,
    Recorded,
    SnapshotFile,
    TensorRecord,
    render,
)
from gradctl.snapshots.snapshot_runs import Run, SubjectRuns, differing_from_itself
from gradctl.snapshots.stored_values import copy_subject, described, named_values
from gradctl.snapshots.tensor_records import record_tensors
from gradctl.snapshots.values_file import MOST_BYTES, describe, full_name, pack, size_of, storable, write_pair
from gradctl.subject.frames import first_line
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that was written.

    Attributes:
        path: of its text.
        content: of its text.
        text_bytes: its size.
        notes: findings on the model that do not prevent a snapshot.
    """

    path: Path
    content: SnapshotFile
    text_bytes: int
    notes: tuple[Finding, ...] = ()

    def count(self, quantity: Quantity) -> int:
        """Return how many tensors of a quantity are recorded, missing gradients excluded."""
        return sum(each.quantity == quantity and each.native is not None for each in self.content.tensors)


def take_snapshot(
    subject: Subject,
    path: Path,
    *,
    options: TargetOptions | None = None,
    values: bool = True,
    full: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Snapshot:
    """Write a snapshot of a model to ``path``, and its values beside it.

    Args:
        subject: the model and its inputs; not changed.
        path: of the text; what is there is replaced when the new one is complete.
        options: those that load the target; None for a model that was given in Python.
        values: whether to store inputs, parameters and buffers (up to 64 MB); if not, only their digests.
        full: store each recorded tensor, too.
        progress: is called with a text.

    Raises:
        TargetError: GC136 if two runs of the model differ; GC111, GC110 and others as ``run_native``.
        ResourceError: GC131 if a file cannot be written.
    """
    say = progress or (lambda text: None)
    with preserve_generators(), warnings.catch_warnings(), ExitStack() as finally_:
        warnings.simplefilter("ignore")
        say("running the model twice")
        baseline = run_native(subject)
        finally_.callback(baseline.kept.put_back)
        ensure_deterministic(subject, [(each.tensor, each.error) for each in baseline.unrepeated])
        own = copy_subject(baseline.subject)
        recorder = SubjectRuns(own, baseline.input_mode)
        say("recording in the native dtype")
        native = recorder.native(with_noise=True)
        ensure_deterministic(subject, differing_from_itself(native, recorder.native(with_noise=False)))
        say("recording in float64")
        float64 = recorder.float64(with_noise=True)
        say("writing")
        portable = _portable_options(options, path) if options is not None else None
        content, stored = _compose(recorder, native, float64, path, portable, values=values, full=full)
    text = render(content)
    write_pair(path, text, content.header.values, stored)
    notes = (*subject.notes, *baseline.notes, *baseline.findings())
    return Snapshot(path, content, len(text), notes)


def rewrite(path: Path, before: SnapshotFile, subject: Subject, options: TargetOptions | None) -> None:
    """Write a snapshot again, of a subject that has its values, with as much as it held before.

    Args:
        path: of the snapshot.
        before: its content.
        subject: a private copy.
        options: those that loaded the subject; None for those of the snapshot.
    """
    values = before.header.values
    recorder = SubjectRuns(subject, before.header.input_mode)
    native, float64 = recorder.native(with_noise=True), recorder.float64(with_noise=True)
    ensure_deterministic(subject, differing_from_itself(native, recorder.native(with_noise=False)))
    portable = _portable_options(options, path) if options is not None else before.header.options
    is_full = values is not None and values.is_full
    content, stored = _compose(recorder, native, float64, path, portable, values=values is not None, full=is_full)
    write_pair(path, render(content), content.header.values, stored)


def ensure_deterministic(subject: Subject, differing: Iterable[tuple[str, object]]) -> None:
    """Raise if tensors differ between two runs, which are given with their relative errors.

    Raises:
        TargetError: GC136.
    """
    shown = [f"{name} by {format_number(error)}" for name, error in differing]  # type: ignore[arg-type]
    if shown:
        raise TargetError(
            "GC136",
            f"{subject.target} is not deterministic: two runs from the same seed differ (relative error of "
            f"{listed(shown, 3)}), so that a snapshot of it could never be verified. Draw from torch's, numpy's or "
            "python's global generator, or call torch.use_deterministic_algorithms(True).",
        )


def _compose(
    recorder: SubjectRuns,
    native: Run,
    float64: Run | Exception,
    path: Path,
    options: LoadOptions | None,
    *,
    values: bool,
    full: bool,
) -> tuple[SnapshotFile, bytes | None]:
    """Return the content of a snapshot's text, and that of its values file, None without one."""
    held = named_values(recorder.subject)
    tensors = _recorded(native, float64 if isinstance(float64, Run) else None)
    stored = storable(held) if values else {}
    reason = None if values else "--no-values was given"
    if not full and size_of(stored) > MOST_BYTES:
        reason = f"they need {size_of(stored) / 2**20:.0f} MB, more than {MOST_BYTES // 2**20} MB"
        stored = {}
    if full:
        runs: dict[Precision, Run | Exception] = {"native": native, "float64": float64}
        for precision, run in runs.items():
            tensors_of_run = run.tensors if isinstance(run, Run) else {}
            stored |= {full_name(precision, key): each for key, each in tensors_of_run.items() if each is not None}
    content = pack(stored) if stored else None
    header = Header(
        schema_version=SCHEMA_VERSION,
        name=options.target if options is not None else recorder.subject.target,
        options=options,
        seed=recorder.subject.seed,
        input_mode=recorder.input_mode,
        environment=environment(),
        generators=generators(recorder.subject.seed),
        draws=recorder.draws(),
        float64_error=None if isinstance(float64, Run) else first_line(float64),
        islands=recorder.islands,
        values=describe(path, content, is_full=full) if content is not None else None,
        without_values=reason,
    )
    return SnapshotFile(header=header, values=described(held), tensors=tensors), content


def _records_of(run: Run | None) -> dict[Key, TensorRecord]:
    """Return the record of each tensor of a run."""
    tensors = {key: tensor for key, tensor in run.tensors.items() if tensor is not None} if run is not None else {}
    return record_tensors(tensors, {key: run.noise.get(key, 0.0) for key in tensors} if run is not None else {})


def _recorded(native: Run, float64: Run | None) -> tuple[Recorded, ...]:
    wide, own = _records_of(float64), _records_of(native)
    return tuple(
        Recorded(
            quantity=quantity,
            name=name,
            requires_grad=name in native.differentiable if quantity == "output" else None,
            float64=wide.get((quantity, name)),
            native=own.get((quantity, name)),
        )
        for quantity, name in native.tensors
    )


def _portable_options(options: TargetOptions, path: Path) -> LoadOptions:
    """Return the options with paths relative to the folder of the snapshot, so that both can be moved together."""
    return LoadOptions(
        target=_portable_target(options, path),
        arguments=options.arguments,
        input_specs=options.input_specs,
        inputs_file=_relative(options.inputs_file, path),
        weights=_relative(options.weights, path),
        training=options.training,
        loss=options.loss,
    )


def _portable_target(options: TargetOptions, path: Path) -> str:
    parsed = parse_target(options.target)
    if parsed.file is None:
        return options.target  # a module, or a model of a library
    return f"{_relative(parsed.file, path)}{f':{parsed.name}' if parsed.name else ''}"


def _relative(file: Path | None, path: Path) -> str | None:
    if file is None:
        return None
    return Path(os.path.relpath(file.resolve(), path.resolve().parent)).as_posix()
