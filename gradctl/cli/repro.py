"""The option ``--repro``, and writing the programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gradctl.cli.help import option
from gradctl.cli.reporting import ReportOptions
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.core.findings import Unit
    from gradctl.subject.subject import Subject

_Command = TypeVar("_Command", bound=Callable[..., Any])


def repro_option(command: _Command) -> _Command:
    """Return ``command`` with ``--repro DIR``, passed as ``repro``."""
    text = "For each kind of failing finding, write a program in plain torch that reproduces it, in a folder in DIR."
    kind: Any = click.Path(file_okay=False, path_type=Path)
    return option("--repro", heading="Output", metavar="DIR", type=kind, help=text)(command)


def add_repros(
    units: Sequence[Unit],
    checking: TargetOptions,
    subject: Subject,
    reporting: ReportOptions,
    repro: Path | None,
    *,
    progress: Callable[[str], None],
) -> list[Unit]:
    """Return the units with the programs that were written for them; as they are without ``--repro``."""
    if repro is None:
        return list(units)
    from gradctl.repro.writing import write_repros

    return write_repros(
        units,
        checking,
        subject,
        repro,
        allows=reporting.allows,
        fail_on=reporting.fail_on,
        say=lambda text: click.echo(text, err=True),
        progress=progress,
    )
