"""``gradctl verify``: run a model on the values of a snapshot, and compare with the results that it holds."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError, listed
from gradctl.core.findings import Finding, TensorResult, Unit, note
from gradctl.core.names import DTYPES, SNAPSHOT, input_name, parameter_name
from gradctl.core.numbers import number
from gradctl.core.target_options import TargetOptions
from gradctl.gradients.baseline import Baseline, first_run
from gradctl.numerics.measures import relative_error
from gradctl.snapshots.change_findings import changed_modes, finding_of, row_of, undecided_finding_of
from gradctl.snapshots.changes import TensorChange, compare_elsewhere, compare_runs
from gradctl.snapshots.conditions import changed_conditions, environment, generators
from gradctl.snapshots.snapshot_file import Header, Precision, SnapshotFile, read
from gradctl.snapshots.snapshot_runs import Run, SubjectRuns
from gradctl.snapshots.stored_values import copy_subject, described, ensure_same_names, named_values, write_values
from gradctl.snapshots.take_snapshot import rewrite
from gradctl.snapshots.tensor_records import digest
from gradctl.snapshots.values_file import read_values
from gradctl.subject.frames import first_line
from gradctl.subject.loading.load import load_subject, usable_device
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.signature import module_of
from gradctl.subject.subject import Subject
from gradctl.subject.tree import map_leaves

# Values that a generator, a file of weights or the user's example determines; all others are constants of the code.
_DRAWN = (parameter_name(""), input_name(""))
# Relative difference of constants that another version of torch or another CPU can compute.
_ROUNDING = 1e-3


def verify_snapshot(
    path: Path,
    subject: Subject | None = None,
    *,
    options: TargetOptions | None = None,
    device: str | None = None,
    dtype: str | None = None,
    update: bool = False,
    allows: Allows | Sequence[str] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
) -> Unit:
    """Return whether a model still computes what a snapshot holds.

    Args:
        path: of the snapshot.
        subject: the model and its inputs, whose values are replaced by those of the snapshot in a private copy; None
            loads the target that the snapshot names.
        options: those that loaded the subject; None for those of the snapshot.
        device, dtype: where and in what to run instead (``cuda``, ``bf16``); the oracle is the float64 of the snapshot.
        update: rewrite the snapshot if something changed; the findings are marked as allowed then.
        allows, fail_on, progress: as in ``gradcheck``.

    Raises:
        TargetError: GC133 if the snapshot or its values cannot be read; GC134 if it is of another model; GC135 if it
            has no values, and the model has others; others as ``load_subject``.
    """
    start, say = time.perf_counter(), progress or (lambda text: None)
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    snapshot = read(path)
    if subject is None:
        options = options or options_of(snapshot.header, path)
        subject = load_subject(options)
    with preserve_generators(), warnings.catch_warnings(), ExitStack() as finally_:
        warnings.simplefilter("ignore")
        say("running the model twice")
        baseline = first_run(subject, finally_)
        built = baseline.subject if baseline is not None else subject
        mode = baseline.input_mode if baseline is not None else snapshot.header.input_mode
        own, stored, notes = _on_stored_values(built, snapshot, path, options)
        say("comparing with the snapshot")
        if device is None and dtype is None:
            found = _compare(SubjectRuns(own, mode), snapshot, stored, judges_draws=not update)
        else:
            found = _compare_elsewhere(SubjectRuns(_moved(own, device, dtype), mode), snapshot)
        found = _undecided(found, baseline)
        changed = list(found.findings)
        if update and changed:
            say("rewriting the snapshot")
            rewrite(path, snapshot, own, options)
            changed = [msgspec.structs.replace(each, allowed=True) for each in changed]
        findings = [*changed, *notes, *_conditions(snapshot.header, device, dtype)]
    unit = make_unit(
        subject.target,
        SNAPSHOT,
        findings,
        found.rows,
        allows=accepted,
        fail_on=fail_on,
        reference=str(path),
        reason=found.reason,
        seconds=time.perf_counter() - start,
    )
    is_open = found.reason is not None and unit.verdict == "pass"
    return msgspec.structs.replace(unit, verdict="inconclusive") if is_open else unit


def options_of(header: Header, path: Path, target: str | None = None, *, threads: int | None = None) -> TargetOptions:
    """Return the options that load the target of a snapshot, or another target in the same way.

    Raises:
        TargetError: GC134 if the model was given in Python, and no target is named.
    """
    stored = header.options
    folder = path.resolve().parent
    if stored is None:
        if target is None:
            raise TargetError(
                "GC134",
                f"{path} is of a model that was given in Python ({header.name}), not of a target. Name the TARGET to "
                "verify, or call gradctl.verify.",
            )
        return TargetOptions(target, seed=header.seed, threads=threads, command="verify")
    return TargetOptions(
        target or _from_here(stored.target, folder),
        arguments=stored.arguments,
        input_specs=stored.input_specs,
        inputs_file=_file_from_here(stored.inputs_file, folder),
        weights=_file_from_here(stored.weights, folder),
        training=stored.training,
        loss=stored.loss,
        seed=header.seed,
        threads=threads,
        command="verify",
    )


def _from_here(target: str, folder: Path) -> str:
    """Return a target with its file, which is relative to the folder of the snapshot, relative to this one."""
    found = re.fullmatch(r"(.+?\.py)(:[^/\\]*)?", target)
    return f"{_file_from_here(found[1], folder)}{found[2] or ''}" if found else target


def _file_from_here(file: str | None, folder: Path) -> Path | None:
    return Path(os.path.relpath(folder / file)) if file is not None else None


def _on_stored_values(
    subject: Subject, snapshot: SnapshotFile, path: Path, loading: TargetOptions | None
) -> tuple[Subject, dict[str, Tensor], list[Finding]]:
    """Return a private copy of the subject with the values of the snapshot, all that it stores, and findings if the
    subject's own values are others.
    """
    own = copy_subject(subject)
    held = named_values(own, subject)
    found = {each.name: each for each in described(named_values(own))}
    expected = {each.name: each for each in snapshot.values}
    ensure_same_names(expected, found, str(path), subject.target)
    others = [name for name, value in expected.items() if value.digest != found[name].digest]
    stored = read_values(path, snapshot)
    if not others:
        return own, stored, []
    reasons = _why_other_values(snapshot.header)
    if left := [name for name in others if name not in stored or name not in held]:
        raise TargetError(
            "GC135",
            f"{path} holds no values of {listed(left, 3)}, and those of {subject.target} are others{reasons}. Take the "
            "snapshot with its values (without --no-values), or pass the same --weights and --inputs to both.",
        )
    constants = _changed_constants({name: held[name].clone() for name in others}, stored, snapshot.header, loading)
    write_values({name: held[name] for name in others}, stored)
    said = f"{len(others)} of {len(expected)} parameters, buffers and inputs of {subject.target} are others than in "
    said += f"the snapshot ({listed(others, 3)}){reasons}; the run uses those of the snapshot."
    return own, stored, [*constants, note("GC315", said)]


def _changed_constants(
    own: dict[str, Tensor], stored: dict[str, Tensor], header: Header, loading: TargetOptions | None
) -> list[Finding]:
    """Return a finding for each buffer, or tensor in an attribute, whose value the code of the target determines, and
    that is another than in the snapshot: the run uses the stored one, so that no result would show the change.
    """
    if loading is None or loading.weights is not None or _changed_generators(header):
        return []  # the caller's own values, those of a file, or other random numbers
    kept = {name: tensor for name, tensor in own.items() if not name.startswith(_DRAWN)}
    again = named_values(load_subject(loading)) if kept else {}
    rounding = _ROUNDING if _value_conditions(header) else 0.0
    found = []
    for name, tensor in kept.items():
        repeated = again.get(name)
        if repeated is None or digest(repeated) != digest(tensor):
            continue  # memory without a value, or numbers that are drawn without the seed
        error = relative_error(stored[name], tensor)
        if error > rounding:
            found.append(
                Finding(
                    code="GC315",
                    severity="error",
                    quantity="buffer",
                    tensor=name,
                    verdict="differs",
                    message=f"{name} has another value than in the snapshot before the call (relative error "
                    f"{error:.2e}), although all random generators yield the same numbers from the seed: the code of "
                    "the target changed, or a file that it reads. The run used the value of the snapshot.",
                    hint="if this is intended, take the snapshot again with gradctl snapshot (not with --update, which "
                    "keeps the value).",
                    error=number(error),
                    allow=f"GC315:{name}",
                )
            )
    return found


def _changed_generators(header: Header) -> list[str]:
    """Return the generators that yield other numbers from the seed now."""
    now = generators(header.seed)
    return [name for name, found in header.generators.items() if now.get(name) != found]


def _value_conditions(header: Header) -> list[str]:
    """Return those conditions that change random numbers and rounding, where they differ."""
    before = {key: header.environment.get(key, "none") for key in ("torch", "CPU capability", "threads")}
    return changed_conditions(before, {key: environment()[key] for key in before})


def _why_other_values(header: Header) -> str:
    """Return what can be the reason why the same seed yields other values: generators, capability, threads."""
    differing = _changed_generators(header)
    if not differing:
        return ", although all random generators yield the same numbers from the seed"
    others = _value_conditions(header)
    reason = f" ({', '.join(others)})" if others else ""
    return f", because generators yield other numbers from the seed: {listed(differing)}{reason}"


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """The result of a comparison; the reason says why it is not complete."""

    findings: Sequence[Finding]
    rows: Sequence[TensorResult]
    reason: str | None = None


def _compare(model: SubjectRuns, snapshot: SnapshotFile, stored: dict[str, Tensor], *, judges_draws: bool) -> _Found:
    """Return what changed, worst first, natively and in float64; nothing is judged if the model draws other numbers."""
    header, reason = snapshot.header, None
    runs: dict[Precision, Run] = {"native": model.native(with_noise=False)}
    if header.float64_error is None:
        run = model.float64(with_noise=False)
        if isinstance(run, Run):
            runs["float64"] = run
        else:
            reason = f"the model does not run in float64, as it did when the snapshot was taken: {first_line(run)}"
    changes = compare_runs(snapshot, runs, stored)
    found = _judged(model, snapshot, changes, runs["native"], judges_draws=judges_draws)
    return replace(found, reason=reason)


def _compare_elsewhere(model: SubjectRuns, snapshot: SnapshotFile) -> _Found:
    """Return what differs from the snapshot's float64 on another device or in another dtype."""
    run = model.native(with_noise=True)
    changes = compare_elsewhere(snapshot, run)
    return _judged(model, snapshot, changes, run, judges_draws=snapshot.header.draws[0] > 0)


def _judged(
    model: SubjectRuns, snapshot: SnapshotFile, changes: Sequence[TensorChange], native: Run, *, judges_draws: bool
) -> _Found:
    """Return the changes, worst first; if the model draws other numbers, that instead."""
    changed = sorted((each for each in changes if each.differs), key=lambda each: each.severity, reverse=True)
    findings = [finding_of(each) for each in changed] + changed_modes(snapshot.tensors, native.differentiable)
    findings += [undecided_finding_of(each) for each in changes if each.is_undecided]
    rows = [row_of(each) for each in changes]
    if findings and judges_draws and (drawn := model.draws()) != snapshot.header.draws:
        return _Found([_other_draws(snapshot.header.draws, drawn)], _unresolved(rows))
    return _Found(findings, rows)


def _other_draws(before: tuple[int, str], now: tuple[int, str]) -> Finding:
    counts = f"{now[0]} numbers instead of {before[0]}" if now[0] != before[0] else "other numbers than in the snapshot"
    return Finding(
        code="GC316",
        severity="warning",
        verdict="unresolved",
        message=f"the model draws {counts} from torch's generator (dropout, noise): the differences cannot be judged.",
        hint="take the snapshot in evaluation mode (--eval), or pass the noise as an input.",
    )


def _unresolved(rows: Sequence[TensorResult]) -> list[TensorResult]:
    changed = ("differs", "missing")
    return [msgspec.structs.replace(row, verdict="unresolved") if row.verdict in changed else row for row in rows]


def _undecided(found: _Found, baseline: Baseline | None) -> _Found:
    """Return the result; of a model that differs from itself now, that and nothing else."""
    if baseline is None or not baseline.unrepeated or not found.findings:
        return found
    return _Found(baseline.findings(), baseline.unrepeated, found.reason)


def _moved(own: Subject, device: str | None, dtype: str | None) -> Subject:
    """Return a private copy on another device, its floats in another dtype."""
    where = usable_device(device or "cpu")
    kind: torch.dtype | None = getattr(torch, DTYPES[dtype]) if dtype is not None else None

    def place(tensor: Tensor) -> Tensor:
        is_real = tensor.is_floating_point()
        return tensor.to(where, kind if kind is not None and is_real else tensor.dtype)

    owner = module_of(own.model)
    if owner is not None:
        owner.to(where, kind)
    for tensor in named_values(own).values():  # those in attributes, too
        tensor.data = place(tensor.detach())
    args, kwargs = map_leaves(
        lambda _, leaf: place(leaf.detach()) if isinstance(leaf, Tensor) else leaf, (own.args, own.kwargs)
    )
    return replace(own, args=args, kwargs=kwargs)


def _conditions(header: Header, device: str | None, dtype: str | None) -> list[Finding]:
    now: dict[str, Any] = environment()
    before: dict[str, Any] = dict(header.environment)
    for name, value in (("device", device), ("dtype", dtype)):
        if value is not None:
            before[name], now[name] = {"device": "cpu", "dtype": "the model's own"}[name], value
    others = changed_conditions(before, now)
    return [note("GC314", f"also different: {', '.join(others)}.")] if others else []
