"""The options of reports, and emitting a report: what every checking command shares.

A command is decorated with ``report_options``, or with ``output_options`` if it judges nothing itself, receives a
``ReportOptions``, and returns ``emit(report, options)``.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from gradctl.cli.help import choice_option, option
from gradctl.cli.main import silence_stdout
from gradctl.core.errors import GradctlError, ResourceError, nearest
from gradctl.core.names import FORMATS, SEVERITIES

if TYPE_CHECKING:
    from gradctl.core.allows import Allows
    from gradctl.core.findings import Report, Unit
    from gradctl.core.target_options import TargetOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])

_INTERRUPTED = 130
_REPORT = "Also write a report in this format to FILE. May be repeated."
_PLOT = "Also write the figures of the HTML report to a folder, as PNG and SVG. Needs matplotlib."
_ALLOW = "Accept a finding that is intentional. May be repeated."
_VERBOSE = "Print every tensor and finding, tracebacks, and how likely a pass has missed an error of 1 %."


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Where a report goes, and which findings fail: those of severity ``fail_on`` or worse that are not allowed.

    ``files`` are more reports, as (format, path); ``plots`` is the folder of the figures.
    """

    format: str = "console"
    files: tuple[tuple[str, Path], ...] = ()
    verbose: bool = False
    quiet: bool = False
    allows: tuple[str, ...] = ()
    fail_on: str = "error"
    plots: Path | None = None


REPORT_PARAMETERS = tuple(each.name for each in fields(ReportOptions))


def _format_files(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, Path], ...]:
    """Return format and path of each ``FORMAT=FILE``."""
    files: list[tuple[str, Path]] = []
    for value in values:
        format_name, equals, file = value.partition("=")
        if not equals or not file:
            raise click.BadParameter(f"{value!r} is not FORMAT=FILE, for example junit=report.xml.")
        if format_name not in FORMATS:
            known = f"{nearest(format_name, FORMATS)}. Formats: {', '.join(FORMATS)}."
            raise click.BadParameter(f"unknown format {format_name!r}{known}")
        if any(Path(file) == path for _, path in files):
            raise click.BadParameter(f"{file!r} is the file of two reports; write each to its own file.")
        files.append((format_name, Path(file)))
    return tuple(files)


def _allows(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return each ``CODE[:NAME]`` with its code in capitals; the code has a page."""
    from gradctl.rules.catalogue import allow_problem

    allows = []
    for value in values:
        code, colon, name = value.partition(":")
        allow = f"{code.upper()}{colon}{name}"
        if problem := allow_problem(allow, value):
            raise click.BadParameter(problem)
        allows.append(allow)
    return tuple(allows)


_output = functools.partial(option, heading="Output")
_OUTPUT = (
    choice_option("--format", "FORMAT", FORMATS, "Format of standard output", heading="Output"),
    _output("--report", "files", metavar="FORMAT=FILE", callback=_format_files, multiple=True, help=_REPORT),
    _output("--plot", "plots", metavar="DIR", type=click.Path(path_type=Path), help=_PLOT),
    _output("-q", "--quiet", is_flag=True, help="Print only the verdict, without progress."),
    _output("-v", "--verbose", is_flag=True, help=_VERBOSE),
)
_JUDGEMENT = (
    click.option("--allow", "allows", metavar="CODE[:NAME]", callback=_allows, multiple=True, help=_ALLOW),
    choice_option("--fail-on", "SEVERITY", SEVERITIES, "Fail on findings of this severity or worse"),
)


def _with_options(command: _Command, *, options: Sequence[Callable[..., Any]]) -> _Command:
    """Return ``command`` with ``options``, passed as ``reporting``; files are tried before the command starts."""

    @functools.wraps(command)
    def with_reporting(*args: Any, **kwargs: Any) -> Any:
        from gradctl.report.formats import ensure_writable

        reporting = ReportOptions(**{each: kwargs.pop(each) for each in REPORT_PARAMETERS if each in kwargs})
        if reporting.quiet and (reporting.verbose or reporting.format != "console"):
            other = "--verbose" if reporting.verbose else f"--format {reporting.format}"
            raise click.UsageError(f"--quiet prints only the verdict, so it cannot be combined with {other}.")
        for _, path in reporting.files:
            ensure_writable(path)
        if reporting.plots is not None:
            _ensure_plots(reporting.plots)
        return command(*args, reporting=reporting, **kwargs)

    for each in reversed(options):
        with_reporting = each(with_reporting)
    return with_reporting  # type: ignore[return-value]  # click keeps the options in an attribute, the type stays


def _ensure_plots(folder: Path) -> None:
    """Raise if figures cannot be written to a folder, which is made."""
    from gradctl.report.formats import ensure_writable
    from gradctl.report.plots import missing

    if reason := missing():
        raise click.UsageError(f"--plot: {reason}")
    if not folder.exists() and folder.parent.is_dir():
        folder.mkdir()
    ensure_writable(folder / "figure.png")


# Decorators of a command: of one that judges nothing itself, and of any other.
output_options = functools.partial(_with_options, options=_OUTPUT)
report_options = functools.partial(_with_options, options=(*_OUTPUT, *_JUDGEMENT))


def read_report(file: str) -> Report:
    """Return the report in a file that --report json=FILE wrote; - is standard input.

    Raises:
        GradctlError: GC132 if it cannot be read, or is not a report.
    """
    from gradctl.report.machine.json import load

    name = "standard input" if file == "-" else repr(file)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GradctlError(
            "GC132",
            f"{name} cannot be read: {reason[0].lower()}{reason[1:]}. FILE is a report written by --report json=FILE.",
        ) from error
    return load(content, name)


def emit(report: Report, reporting: ReportOptions, *, preface: str = "") -> int:
    """Write the files, print the report, and return the exit code of its verdict; 130 if the run was interrupted.

    ``preface`` are lines before the console report, which no other format has.

    Raises:
        ResourceError: GC131 if a file or standard output cannot be written; a closed pipe is not an error.
    """
    from gradctl.core.verdicts import EXIT_CODES
    from gradctl.report.formats import render, write

    for format_name, path in reporting.files:
        write(path, render(report, format_name))
    if reporting.plots is not None:
        from gradctl.report.plots import write_plots

        write_plots(report, reporting.plots)
    if "github" in (reporting.format, *(format_name for format_name, _ in reporting.files)):
        _append_step_summary(report)
    if reporting.format == "console":
        from gradctl.report.text import console

        how = {"is_quiet": reporting.quiet, "is_verbose": reporting.verbose}
        text = console.render(report, width=terminal_width(), colour=_is_colourful(), **how)
        _print(text if reporting.quiet else preface + text)
    else:
        _print(render(report, reporting.format))
    return _INTERRUPTED if report.status == "interrupted" else EXIT_CODES[report.verdict]


@contextmanager
def judging(reporting: ReportOptions) -> Iterator[tuple[Allows, Callable[[str], None]]]:
    """Provide the accepted findings, and a function that shows progress; what runs inside imports torch."""
    from gradctl.core.allows import Allows

    with progress_line(is_shown=not reporting.quiet) as progress:
        progress("importing torch")
        yield Allows(reporting.allows), progress


def emit_units(
    units: Sequence[Unit], allows: Allows, checking: TargetOptions, reporting: ReportOptions, *, preface: str = ""
) -> int:
    """Report on units as ``emit`` does."""
    from gradctl.core.assembly import make_report

    report = make_report(
        checking.command, units, allows, seed=checking.seed, device=checking.device, fail_on=reporting.fail_on
    )
    return emit(report, reporting, preface=preface)


@contextmanager
def progress_line(
    stream: TextIO | None = None, *, after_seconds: float = 1.0, is_shown: bool = True
) -> Iterator[Callable[[str], None]]:
    """Provide a function that shows the elapsed time and a text on ``stream`` (stderr), in place of the text before.

    The time advances each second. The last text is cleared at the end; one that ends in a newline stays. Nothing is
    shown unless the stream is a terminal, nor in the first ``after_seconds``: a quick check prints no progress.
    """
    stream = stream if stream is not None else sys.stderr
    if not is_shown or not stream or not stream.isatty():
        yield lambda text: None
        return
    started, lock, ended = time.monotonic(), threading.Lock(), threading.Event()
    last = drawn = ""

    def draw(text: str | None = None) -> None:
        nonlocal last, drawn
        with lock:
            last = last if text is None else text
            seconds = time.monotonic() - started
            if not last or seconds < after_seconds:
                return
            elapsed = f", {format_clock(seconds)}"
            line = last if last.endswith("\n") else last[: (terminal_width() or 80) - 1 - len(elapsed)] + elapsed
            stream.write(f"\r{line.rstrip():<{len(drawn)}}" + "\n" * (line is last))
            stream.flush()
            last, drawn = ("", "") if line is last else (last, line)

    def tick() -> None:
        while not ended.wait(1.0):
            draw()

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield draw
    finally:
        ended.set()
        ticking.join()
        if drawn:
            stream.write(f"\r{'':<{len(drawn)}}\r")
            stream.flush()


def format_clock(seconds: float) -> str:
    """Return a duration in minutes and seconds, ``0:42``; from an hour on ``1:02:03``."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _append_step_summary(report: Report) -> None:
    """Append the report to the page that GitHub shows for a step; a failure does not change the verdict."""
    from gradctl.report.text.github import step_summary

    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if not page:
        return
    try:
        with Path(page).open("a", encoding="utf-8") as file:
            file.write(step_summary(report))
    except OSError as error:
        click.echo(f"the step summary {page!r} cannot be written: {error.strerror}", err=True)


def _is_colourful() -> bool:
    """Return whether standard output is a terminal that supports colour (https://no-color.org)."""
    return terminal_width() is not None and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width() -> int | None:
    """Return the columns of the terminal, or None if standard output is not one."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return max(40, shutil.get_terminal_size().columns) if is_terminal else None


def _print(text: str) -> None:
    """Write to standard output, in UTF-8 regardless of the locale, as JSON and XML require."""
    if sys.stdout is None:
        return
    try:
        binary = getattr(sys.stdout, "buffer", None)
        if binary is None:
            sys.stdout.write(text)
        else:
            sys.stdout.flush()
            binary.write(text.encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    except OSError as error:
        raise ResourceError(
            "GC131", f"standard output cannot be written: {error.strerror}. Redirect it elsewhere.", exit_code=2
        ) from error
