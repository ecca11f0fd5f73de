"""``gradctl check``: the gate for CI: many targets in many forms, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradctl.cli.dask_options import DaskOptions, dask_options
from gradctl.cli.help import FiniteRange, FormChoice, HelpfulCommand
from gradctl.cli.reporting import ReportOptions, emit, format_clock, progress_line, read_report, report_options
from gradctl.core.errors import GradctlError, NothingToCheck, TargetError
from gradctl.core.names import FORMS, LONGEST_SECONDS, SNAPSHOT

if TYPE_CHECKING:
    from gradctl.core.findings import Report, Unit
    from gradctl.suite.configuration import Accepted, Project
    from gradctl.suite.journal import Journal
    from gradctl.suite.plan import Planned, Runner

_MOST_JOBS = 8


_CONFIG = "Configuration.  [default: the nearest gradctl.toml, or pyproject.toml with [tool.gradctl]]"
_KEYWORDS = "Run only units with TEXT in 'TARGET FORM'. May be repeated."
_UNIT_FORMS = (*FORMS, SNAPSHOT)
_FORM_CHOICE = FormChoice(_UNIT_FORMS)
_FORM = f"Run only this form: {_FORM_CHOICE.text}. May be repeated."
_JOBS = f"Processes at a time.  [default: one for each CPU, at most {_MOST_JOBS}]"
_TIMEOUT = "Time limit of each unit.  [default: 300]"
_MEMORY = "Memory limit of each process, on the CPU: 8GiB.  [default: no limit]"
_SNAPSHOT = "Verify the snapshot of each target in this folder, too.  [default: 'snapshots' of the configuration]"
_UPDATE = "Write the snapshots that are missing or differ, after the differences are listed."
_RESUME = "Run only units that had not ended when the run with the same --report files died."
_SHARD = "Run the I-th of N parts of the units; 'gradctl report --merge' joins the reports."
_DURATIONS = "JSON report of an earlier run: --shard divides the units by their seconds there.  [default: by number]"
_WRITE_ALLOWS = "Write the findings that fail into the configuration, each accepted up to its present error."


def _memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return bytes."""
    if value is None:
        return None
    from gradctl.suite.configuration import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return index and count of ``I/N``."""
    if value is None:
        return None
    numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
    index, count = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not 1 <= index <= count:
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, for example 2/4.")
    return index, count


@click.command(
    cls=HelpfulCommand,
    epilog="\b\nExamples:\n"
    "  gradctl check\n"
    "  gradctl check sample_models --form eager --form export\n"
    "  gradctl check --snapshot snapshots --form snapshot --update\n"
    "  gradctl check --report junit=gradctl.xml --format github",
)
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--config", "file", metavar="FILE", type=click.Path(path_type=Path), help=_CONFIG)
@click.option("-k", "keywords", metavar="TEXT", multiple=True, help=_KEYWORDS)
@click.option("--form", "forms", metavar="FORM", type=_FORM_CHOICE, multiple=True, help=_FORM)
@click.option("--list", "is_listed", is_flag=True, help="List the units that would run, and stop.")
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), help=_JOBS)
@click.option("--timeout", metavar="SECONDS", type=FiniteRange(0, LONGEST_SECONDS, min_open=True), help=_TIMEOUT)
@click.option("--memory", metavar="SIZE", callback=_memory, help=_MEMORY)
@click.option("--snapshot", "snapshots", metavar="DIR", type=click.Path(path_type=Path), help=_SNAPSHOT)
@click.option("--update", is_flag=True, help=_UPDATE)
@click.option("--resume", is_flag=True, help=_RESUME)
@click.option("--shard", metavar="I/N", callback=_shard, help=_SHARD)
@click.option("--durations", metavar="FILE", type=click.Path(path_type=Path), help=_DURATIONS)
@dask_options
@click.option("--write-allows", is_flag=True, help=_WRITE_ALLOWS)
@report_options
def check(
    reporting: ReportOptions,
    *,
    paths: tuple[str, ...],
    file: Path | None,
    keywords: tuple[str, ...],
    forms: tuple[str, ...],
    is_listed: bool,
    jobs: int | None,
    snapshots: Path | None,
    update: bool,
    resume: bool,
    shard: tuple[int, int] | None,
    durations: Path | None,
    cluster: DaskOptions,
    write_allows: bool,
    **limits: Any,
) -> int:
    """Check many targets in many forms, each in a process of its own.

    Without PATH, all targets of the configuration are checked. PATH is a folder, of which the files that define
    make_model are checked; a file; or a TARGET. A unit is one target in one form: eager is compared with finite
    differences, each other form with eager. A unit that crashes, hangs or runs out of memory is inconclusive, and the
    others are still checked.

    With a folder of snapshots, a target has another unit: what it computes now is compared with its snapshot there. A
    target without one is skipped, and --update writes it.

    With --report FILE, the run keeps a journal beside the first FILE until the report is written. If the run dies,
    --resume continues it.
    """
    from gradctl.report.formats import ensure_writable
    from gradctl.suite.discovery import select_entries
    from gradctl.suite.kept_snapshots import note_unused_files, snapshot_folder
    from gradctl.suite.plan import plan

    try:
        project = _project(file, paths)
        entries = select_entries(project, paths)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise TargetError("GC101", f"{error.filename!r} cannot be looked up: {error.strerror}.") from error
    source = click.get_current_context().get_parameter_source("fail_on")
    fail_on = reporting.fail_on if source is click.core.ParameterSource.COMMANDLINE else None
    folder = snapshot_folder(project, snapshots)
    if folder is None and (update or SNAPSHOT in forms):
        flag = "--update" if update else f"--form {SNAPSHOT}"
        raise click.UsageError(
            f"{flag} needs a folder of snapshots: add --snapshot DIR, or 'snapshots' to {project.file}."
        )
    planned = plan(
        project,
        entries,
        forms=forms,
        keywords=keywords,
        allows=reporting.allows,
        snapshots=folder,
        update=update,
        fail_on=fail_on,
        **limits,
    )
    if not planned:
        raise NothingToCheck("GC110", "no unit matches -k and --form. See 'gradctl check --list' for the units.")
    whole, positions = planned, None
    if shard is not None:
        if write_allows:
            raise click.UsageError("--write-allows needs the verdict on every unit: run it without --shard.")
        from gradctl.suite.shards import select_shard

        earlier = read_report(str(durations)) if durations is not None else None
        positions = select_shard(whole, *shard, earlier)
        planned = [whole[position] for position in positions]
    elif durations is not None:
        raise click.UsageError("--durations divides the units of --shard I/N, which is missing.")
    if is_listed:
        click.echo("".join(f"{line}\n" for line in _listed(planned)), nl=False)
        return 0
    if write_allows:
        ensure_writable(project.file)
    sys.path.append(str(project.root))  # modules that the configuration names; the processes have our path

    def noted(units: Sequence[Unit]) -> Sequence[Unit]:
        # Only without PATH are these all targets that may have a snapshot. Of several shards, one notes.
        first = next((each for each in whole if each.form == SNAPSHOT), None)
        is_noted = folder is not None and not paths and first in planned
        return note_unused_files(folder, entries, units) if folder is not None and is_noted else units

    def sharded(report: Report, units: Sequence[Unit | None]) -> Report:
        if shard is None or positions is None:
            return report
        import msgspec

        from gradctl.suite.shards import describe_shard

        judged = [position for position, unit in zip(positions, units, strict=True) if unit is not None]
        described = describe_shard(*shard, whole, judged, everywhere=reporting.allows, every=_every_unit(project))
        return msgspec.structs.replace(report, shard=described)

    if resume and not reporting.files:
        raise click.UsageError("--resume continues the journal beside a report: add the --report of the run that died.")
    processes = project.configuration.jobs or processors()
    with (
        _journal(project, planned, reporting, resumes=resume) as journal,
        cluster.runner(project, planned, jobs=jobs, processors=processes) as runner,
    ):
        code = _checked(
            project,
            planned,
            reporting,
            noted,
            sharded,
            whole=whole,
            runner=runner,
            write_allows=write_allows,
            journal=journal,
        )
        if journal is not None and code not in (130, 143):
            journal.remove()
        return code


def processors() -> int:
    """Return how many processes run at a time by default."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _MOST_JOBS)


@contextlib.contextmanager
def _journal(
    project: Project, planned: Sequence[Planned], reporting: ReportOptions, *, resumes: bool
) -> Iterator[Journal | None]:
    """Open the journal beside the first file of a report; None if the run writes no report into a file."""
    from gradctl.report.text.wording import counted
    from gradctl.suite.journal import SUFFIX, open_journal

    paths = [path.resolve() for _, path in reporting.files if path.is_file() or not path.exists()]
    if not paths:
        yield None
        return
    path = paths[0].with_name(paths[0].name + SUFFIX)
    with open_journal(path, project, [each.request for each in planned], resumes=resumes) as journal:
        if resumes:
            died = f" Running when it died: {', '.join(journal.running)}." if journal.running else ""
            click.echo(f"resume: {counted(journal.ended, 'unit')} had ended and will not run again.{died}", err=True)
        yield journal


def _checked(
    project: Project,
    planned: list[Planned],
    reporting: ReportOptions,
    noted: Callable[[Sequence[Unit]], Sequence[Unit]],
    sharded: Callable[[Report, Sequence[Unit | None]], Report],
    *,
    whole: Sequence[Planned],
    runner: Runner,
    write_allows: bool,
    journal: Journal | None,
) -> int:
    from gradctl.core.assembly import assemble_report
    from gradctl.isolation.units import Interrupted
    from gradctl.suite.configuration import options_of
    from gradctl.suite.plan import note_unused, run
    from gradctl.suite.update_allows import accept_failing, find_unused

    shared = options_of(project)
    report = partial(assemble_report, "check", seed=shared.seed, device=shared.device, threads=shared.threads)
    plan = planned
    entries: list[Accepted] = []

    def judged(some: Sequence[Planned]) -> list[Unit]:
        count = sum(journal is None or journal.unit_of(each.request) is None for each in some)
        with unit_progress(count, is_shown=not reporting.quiet) as said:
            return run(some, runner=runner, on_result=said, journal=journal)

    with _terminable():
        try:
            units = judged(plan)
            if write_allows:
                plan, units, entries = accept_failing(plan, units, judged)
        except Interrupted as interrupted:
            complete = [unit for unit in interrupted.units if unit is not None]
            emit(sharded(report(complete, (), planned=len(interrupted.units)), interrupted.units), reporting)
            if isinstance(interrupted.__cause__, GradctlError):
                raise interrupted.__cause__ from None
            return 143 if isinstance(interrupted.__cause__, _Terminated) else 130
    every = [*_every_unit(project), *whole]
    if write_allows:
        gone = find_unused(project, plan, units, every)
        _write(project, entries, gone)
        _point_to_expect(units)
        plan = [each.accepting(without=gone) for each in plan]
    units, allowances = note_unused(plan, units, reporting.allows, every)
    return emit(sharded(report(noted(units), allowances), units), reporting)


def _project(file: Path | None, paths: Sequence[str]) -> Project:
    """Return the configuration that is named, or the nearest one to the paths, or an empty one."""
    from gradctl.suite.configuration import FILE_NAME, Configuration, Project, find_configuration, read_configuration
    from gradctl.suite.discovery import module_and_name

    if file is not None:
        return read_configuration(file)
    here = Path.cwd()
    places = [Path(module_and_name(path)[0]).absolute() for path in paths]
    folders = [place if place.is_dir() else place.parent for place in places if place.exists()]
    folder = Path(os.path.commonpath(folders)) if folders else here
    found = find_configuration(folder)
    if found is not None:
        return read_configuration(found)
    return Project((here if folder.is_relative_to(here) else folder) / FILE_NAME, Configuration())


def _listed(planned: Sequence[Planned]) -> Iterator[str]:
    """Yield a line for each unit: target, form, expected verdict, accepted findings."""
    width = max(len(each.title) for each in planned)
    for each in planned:
        accepted = dict.fromkeys(entry.finding for entry in each.accepted)
        says = [f"expect {each.expected}"] if each.expected else []
        says += [f"allow {', '.join(accepted)}"] if accepted else []
        yield f"{each.title:<{width}}  {each.form:<7}  {'; '.join(says)}".rstrip()


def _every_unit(project: Project) -> list[Planned]:
    """Return all units of the configuration; none if it accepts no finding, so that nothing can be unused."""
    from gradctl.suite.discovery import select_entries
    from gradctl.suite.plan import plan

    configuration = project.configuration
    if not configuration.allow and not any(entry.allow for entry in configuration.targets):
        return []
    try:
        return plan(project, select_entries(project, ()))
    except NothingToCheck:
        return []


def _write(project: Project, entries: Sequence[Accepted], gone: Sequence[Accepted]) -> None:
    """Write entries into the configuration, and take out those that are gone."""
    from gradctl.report.formats import write
    from gradctl.suite.update_allows import rewrite_allows

    if entries or gone:
        text = project.file.read_bytes().decode() if project.file.exists() else ""
        write(project.file, rewrite_allows(project.file, text, add=entries, drop=gone))
    click.echo(f"{project.file}: {len(entries)} written to 'allow', {len(gone)} removed", err=True)


def _point_to_expect(units: Sequence[Unit]) -> None:
    """Print what accepts the units that are inconclusive: entries of 'allow' accept findings."""
    inconclusive = [unit for unit in units if unit.verdict == "inconclusive"]
    for target in dict.fromkeys(unit.target for unit in inconclusive):
        forms = ", ".join(f'{unit.form} = "inconclusive"' for unit in inconclusive if unit.target == target)
        hint = f"If this is expected, add to its [[targets]] entry: expect = {{{forms}}}"
        click.echo(f"{target} is inconclusive, which 'allow' does not accept. {hint}", err=True)


@contextlib.contextmanager
def unit_progress(total: int, *, is_shown: bool = True) -> Iterator[Callable[[Unit], None]]:
    """Provide a function that shows each complete unit, with how many are and the elapsed time.

    On a terminal each line replaces the last one; a log has them all.
    """
    ended, started = 0, time.monotonic()
    with progress_line(is_shown=is_shown) as progress:
        progress(f"0 of {total} units")

        def said(unit: Unit) -> None:
            nonlocal ended
            ended += 1
            line = f"{unit.target}, {unit.form}: {unit.verdict}, {unit.seconds:.1f} s; {ended} of {total} units"
            if sys.stderr is not None and sys.stderr.isatty():
                progress(line)
            elif is_shown:
                click.echo(f"{line}, {format_clock(time.monotonic() - started)}", err=True)

        yield said


class _Terminated(KeyboardInterrupt):
    """The run was asked to end by TERM, which ends it as Ctrl-C does."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let TERM interrupt the run."""

    def end(signal_number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
