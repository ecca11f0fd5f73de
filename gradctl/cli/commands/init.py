"""``gradctl init``: a first configuration for ``gradctl check``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gradctl.cli.commands.check import processors, unit_progress
from gradctl.cli.help import WITHOUT_VERDICT, HelpfulCommand
from gradctl.core.errors import NothingToCheck


@click.command(
    cls=HelpfulCommand,
    exit_codes={**WITHOUT_VERDICT, 0: "written", 5: "no model can be checked"},
    epilog="\b\nExample:\n  gradctl init sample_models",
)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False), default=".")
@click.option("--force", is_flag=True, help="Replace a configuration that exists.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes at a time.  [default: one for each CPU, at most 8]")
def init(folder: Path, *, force: bool, jobs: int | None) -> int:
    """Write a gradctl.toml for the models of a folder.

    Models are Python files that define make_model; and files that only import and define, and define model or an
    nn.Module class. Each is imported and gradchecked in a process of its own. One that cannot be loaded or run is a
    comment in gradctl.toml, with the reason.
    """
    from gradctl.report.formats import ensure_writable, write
    from gradctl.report.text.wording import counted, why_skipped
    from gradctl.suite.configuration import FILE_NAME, Configuration, Project
    from gradctl.suite.discovery import find_models
    from gradctl.suite.plan import plan, run
    from gradctl.suite.template import first_configuration

    project = Project(folder / FILE_NAME, Configuration())
    if not force:
        _refuse_to_replace(folder)
    ensure_writable(project.file)
    entries = find_models(project)
    planned = plan(project, entries, forms=["eager"])
    sys.path.append(str(folder.resolve()))  # for modules beside the models; the processes have our path
    with unit_progress(len(planned)) as said:
        units = run(planned, jobs=jobs or processors(), on_result=said)
    left_out = [f"{unit.target} is not checked: {why_skipped(unit)}" for unit in units if unit.status != "complete"]
    if len(left_out) == len(units):
        message = f"no Python file in {folder} defines a model that can be checked. Define make_model() in one."
        raise NothingToCheck("GC110", message, details="\n".join(left_out))
    write(project.file, first_configuration(entries, units))
    written = f"{project.file} has {counted(len(units) - len(left_out), 'target')}. Run: gradctl check"
    click.echo("\n".join([*left_out, written if folder == Path() else f"{written} --config {project.file}"]))
    return 0


def _refuse_to_replace(folder: Path) -> None:
    from gradctl.suite.configuration import FILE_NAME, find_configuration

    found = find_configuration(folder.resolve())
    if found is not None and found.parent == folder.resolve():
        raise click.UsageError(f"{folder / found.name} exists. Give --force to replace it by a new {FILE_NAME}.")
