"""The options of ``gradctl check`` that run its units on a Dask cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gradctl.suite.configuration import Project
    from gradctl.suite.plan import Planned, Runner

_Command = TypeVar("_Command", bound=Callable[..., Any])

_DASK = "Run the units on a Dask cluster: tcp://HOST:8786, tls://HOST:8786, or local, which starts one here."
_SHARED = "The workers of --dask have the files at the same path; else those of the configuration's folder are sent."
_FORCE = "Use workers of --dask that have other versions of torch, gradctl, Python, and so on."


@dataclass(frozen=True, slots=True)
class DaskOptions:
    """The address of a scheduler, or ``local``; None runs the units without Dask."""

    dask: str | None = None
    shared: bool = False
    force_versions: bool = False

    @contextmanager
    def runner(
        self, project: Project, planned: Sequence[Planned], *, jobs: int | None, processors: int
    ) -> Iterator[Runner]:
        """Provide what runs units: here, or on the cluster.

        ``jobs`` is the most at a time; None for ``processors``, or for as many as the workers of a cluster have
        threads. Errors are those of ``cluster_runner``, and UsageError if options contradict each other.
        """
        from gradctl.isolation.units import run_units

        if self.dask is None:
            if self.shared or self.force_versions:
                raise click.UsageError(f"{'--shared' if self.shared else '--force-versions'} needs --dask ADDRESS.")
            yield functools.partial(run_units, jobs=jobs or processors)
            return
        from gradctl.suite.cluster.connection import LOCAL, cluster_runner

        is_local = self.dask == LOCAL
        requests = [each.request for each in planned]
        if any(each.update for each in requests) and not (is_local or self.shared):
            raise click.UsageError("--update writes snapshots, which would stay on the workers: add --shared.")
        with cluster_runner(
            self.dask,
            project,
            requests,
            jobs=jobs or processors if is_local else jobs,
            is_shared=self.shared,
            forces_versions=self.force_versions,
            say=lambda text: click.echo(text, err=True),
        ) as runner:
            yield runner


def dask_options(command: _Command) -> _Command:
    """Return ``command`` with the options of Dask, passed as ``cluster``."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        given = {each.name: options.pop(each.name) for each in fields(DaskOptions)}
        return command(*arguments, cluster=DaskOptions(**given), **options)

    decorated: Any = click.option("--force-versions", is_flag=True, help=_FORCE)(wrapped)
    decorated = click.option("--shared", is_flag=True, help=_SHARED)(decorated)
    return click.option("--dask", metavar="ADDRESS", help=_DASK)(decorated)  # type: ignore[no-any-return]
