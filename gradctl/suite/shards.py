"""A run on several machines: which units each shard has, and the report of all shards as that of one run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from gradctl.core.allows import Allows
from gradctl.core.assembly import named_places
from gradctl.core.errors import GradctlError, TargetError
from gradctl.core.findings import Allowance, Report, Shard, ShardAllow, Unit
from gradctl.core.verdicts import failing_severities, run_verdict, summarise, unit_verdict
from gradctl.suite.journal import describe_plan
from gradctl.suite.plan import Planned, unused_note

_SAME = ("torch", "onnx", "onnxruntime", "python", "device")  # of the environment, in the reports of one run


def select_shard(planned: Sequence[Planned], index: int, count: int, durations: Report | None = None) -> list[int]:
    """Return the positions of the units of shard ``index`` of ``count``, counted from 1, in their order.

    The same plan and durations have the same shards on every machine. The longest unit goes to the shard with the least
    work, then the next (Graham, Bounds on multiprocessing timing anomalies, 1969: at most 4/3 of the best).

    Args:
        durations: an earlier report; a unit that it does not have is taken for as long as the median of those it has.

    Raises:
        TargetError: GC110 if there are more shards than units.
    """
    if count > len(planned):
        raise TargetError(
            "GC110", f"--shard {index}/{count} has no unit: the run has {len(planned)}. Use fewer shards."
        )
    known = {(unit.target, unit.form): unit.seconds for unit in durations.units} if durations else {}
    usual = statistics.median(known.values()) if known else 1.0
    seconds = [known.get((each.title, each.form), usual) for each in planned]
    work = [0.0] * count
    sizes = [0] * count
    chosen = []
    for position in sorted(range(len(planned)), key=lambda position: (-seconds[position], position)):
        least = min(range(count), key=lambda shard: (work[shard], sizes[shard], shard))
        work[least] += seconds[position]
        sizes[least] += 1
        chosen += [position] if least == index - 1 else []
    return sorted(chosen)


def describe_shard(
    index: int,
    count: int,
    planned: Sequence[Planned],
    positions: Sequence[int],
    *,
    everywhere: Sequence[str],
    every: Sequence[Planned],
) -> Shard:
    """Return what a report needs to be merged: its place in the run, and all that accepts findings of the run.

    Args:
        planned: all units of the run.
        positions: those of the units in the report.
        everywhere: the findings that the command line accepts.
        every: all units of the configuration, of which the run may be a part.
    """
    run = {(each.title, each.form) for each in planned}
    elsewhere = {entry for each in every if (each.title, each.form) not in run for entry in each.accepted}
    accepted = dict.fromkeys(accepted for each in planned for accepted in each.accepted)
    return Shard(
        index=index,
        count=count,
        plan=describe_plan([each.request for each in planned]),
        planned=len(planned),
        positions=tuple(positions),
        allows=tuple(
            ShardAllow(
                allow=entry.finding,
                is_option=entry.finding in everywhere,
                positions=(its := tuple(k for k, each in enumerate(planned) if entry in each.accepted)),
                is_whole=entry not in elsewhere,
                fails="note" in failing_severities(planned[its[0]].request.fail_on),
            )
            for entry in accepted
        ),
    )


def merge(reports: Mapping[str, Report]) -> Report:
    """Return one report of several, by the names of their files.

    The shards of a run have the report that the run would have had. Reports that are no shards must have no unit in
    common, and are joined in their order.

    Raises:
        GradctlError: GC156 if they are not of one run, a shard is missing or there twice, or a unit is.
    """
    _ensure_one_run(reports)
    first = next(iter(reports.values()))
    units = _in_order(reports)
    if first.shard is None:
        applied: dict[str, bool] = {}
        for each in reports.values():
            for entry in each.allows:
                applied[entry.allow] = applied.get(entry.allow, False) or entry.applied
        allows = [Allowance(allow=allow, applied=is_applied) for allow, is_applied in applied.items()]
        planned = sum(each.planned or len(each.units) for each in reports.values())
    else:
        units, allows = _note_unused(units, first.shard.allows)
        planned = first.shard.planned
    joined = _joined(first, list(units.values()), allows, planned, [each.status for each in reports.values()])
    sources = {(each.file, each.line): each for report in reports.values() for each in report.sources}
    places = (place for place in named_places(joined.units) if place in sources)
    return msgspec.structs.replace(joined, sources=tuple(sources[place] for place in places))


def _joined(
    first: Report, units: Sequence[Unit], allows: Sequence[Allowance], planned: int, statuses: Sequence[str]
) -> Report:
    is_interrupted = "interrupted" in statuses
    verdicts = [unit.verdict for unit in units]
    verdict = run_verdict(verdicts)
    return msgspec.structs.replace(
        first,
        status="interrupted" if is_interrupted else "complete",
        verdict="inconclusive" if is_interrupted and verdict != "fail" else verdict,
        units=tuple(units),
        allows=tuple(allows),
        summary=summarise(verdicts),
        planned=planned if is_interrupted else None,
        shard=None,
    )


def _ensure_one_run(reports: Mapping[str, Report]) -> None:
    (name, first), *others = reports.items()
    for other, report in others:
        for what, then, now in [
            ("gradctl", first.tool.version, report.tool.version),
            ("command", first.command, report.command),
            ("seed", first.seed, report.seed),
            *((each, first.environment.get(each), report.environment.get(each)) for each in _SAME),
        ]:
            if then != now:
                raise _refused(f"{other!r} is of another run than {name!r}: {what} {now}, there {then}.")
        if (first.shard is None) != (report.shard is None):
            whole, part = (name, other) if first.shard is None else (other, name)
            raise _refused(f"{part!r} is a shard of a run, and {whole!r} is not.")
        if first.shard is not None and report.shard is not None:
            same = ("plan", "count", "planned")
            if any(getattr(first.shard, each) != getattr(report.shard, each) for each in same):
                raise _refused(f"{other!r} is of another run than {name!r}: its units, options or shards differ.")
    if first.shard is not None:
        counts = Counter(report.shard.index for report in reports.values() if report.shard is not None)
        for index in range(1, first.shard.count + 1):
            if counts[index] != 1:
                found = f"there {counts[index]} times" if counts[index] else "missing"
                raise _refused(f"shard {index}/{first.shard.count} is {found}.")


def _in_order(reports: Mapping[str, Report]) -> dict[int, Unit]:
    """Return the units by their position in the run."""
    units: dict[int, Unit] = {}
    names: dict[tuple[str, str] | int, str] = {}
    for name, report in reports.items():
        positions = report.shard.positions if report.shard else range(len(units), len(units) + len(report.units))
        if len(positions) != len(report.units):
            raise _refused(f"{name!r} has {len(report.units)} units and the positions of {len(positions)}.")
        for position, unit in zip(positions, report.units, strict=True):
            identity = position if report.shard else (unit.target, unit.form)
            if identity in names:
                both = f"{names[identity]!r} and {name!r}"
                raise _refused(
                    f"{unit.target} {unit.form} is in {both}: they were divided by other --durations, or twice."
                )
            names[identity], units[position] = name, unit
    return dict(sorted(units.items()))


def _note_unused(units: dict[int, Unit], entries: Sequence[ShardAllow]) -> tuple[dict[int, Unit], list[Allowance]]:
    """Return the units with a note for each entry that accepted nothing in the whole run, and all entries."""
    noted, allowances = dict(units), []
    for entry in entries:
        its = [units[position] for position in entry.positions if position in units]
        matching = Allows([entry.allow]).matching
        is_used = any(each.severity != "note" and bool(matching(each.allow)) for unit in its for each in unit.findings)
        allowances.append(Allowance(allow=entry.allow, applied=is_used))
        is_whole = entry.is_whole and len(its) == len(entry.positions)
        if is_used or not is_whole or any(unit.status != "complete" for unit in its):
            continue
        unit = noted[entry.positions[0]]
        note = unused_note(entry.allow, is_option=entry.is_option)
        if note not in unit.findings:  # a shard with all units of the entry has noted it
            findings = (*unit.findings, note)
            fails = entry.fails and unit_verdict(unit.status, findings, unit.tensors, "note") == "fail"
            verdict = "fail" if fails else unit.verdict
            noted[entry.positions[0]] = msgspec.structs.replace(unit, findings=findings, verdict=verdict)
    return noted, allowances


def _refused(what: str) -> GradctlError:
    return GradctlError("GC156", f"the reports cannot be merged: {what}")
