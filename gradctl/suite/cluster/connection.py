"""Connect to a Dask cluster, or start one on this machine, and see that its workers can run the units."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradctl.core.errors import GradctlError, first_line_of, listed
from gradctl.isolation.cleanup import Surroundings
from gradctl.isolation.protocol import UnitRequest
from gradctl.report.text.wording import counted
from gradctl.suite.cluster import place
from gradctl.suite.cluster.dispatch import run_units_on
from gradctl.suite.cluster.place import Layout, worker_versions
from gradctl.suite.cluster.shipment import pack
from gradctl.suite.cluster.workers import Workers
from gradctl.suite.configuration import Project
from gradctl.suite.discovery import absolute
from gradctl.suite.plan import Runner

if TYPE_CHECKING:
    from distributed import Client, Security

LOCAL = "local"
_CONNECT_SECONDS, _WORKER_SECONDS = 6, 3
# Dask's nanny sets them for its workers. Verdicts may depend on threads: a unit has those that it has without Dask.
_SET_BY_DASK = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("PYTHONHASHSEED", "MALLOC_TRIM_THRESHOLD_"),
)


@contextmanager
def cluster_runner(
    address: str,
    project: Project,
    requests: Sequence[UnitRequest],
    *,
    jobs: int | None,
    is_shared: bool = False,
    forces_versions: bool = False,
    say: Callable[[str], None],
) -> Iterator[Runner]:
    """Provide what runs units on the workers of a cluster, as ``run_units`` does on this machine.

    Args:
        address: of the scheduler; ``local`` starts a scheduler and ``jobs`` workers here.
        project: its folder has the files that units need.
        requests: all units.
        jobs: the most units at a time; None for as many as the workers have threads.
        is_shared: whether the workers have the files at the same path; else they are sent there.
        forces_versions: whether workers with other versions are used.
        say: called with what the user should know.

    Raises:
        GradctlError: GC155 if Dask is not installed, nothing answers, no worker is there, a worker has other versions,
            or files cannot be sent.
    """
    variables = {name: os.environ.get(name) for name in _SET_BY_DASK}  # before a nanny is here, which sets them
    with _quiet(), _client(address, jobs) as client:
        workers = _workers(client, address)
        mine = worker_versions()
        found = client.run(worker_versions, on_error="return")
        if differences := _differences(mine, found):
            if not forces_versions:
                what = "Install the same there, or add --force-versions."
                raise GradctlError("GC155", f"workers of {address} differ from this machine: {differences}. {what}")
            say(f"dask: workers differ from this machine, which verdicts may depend on: {differences}")
        archive, where = None, "files are used in place"
        if is_shared:
            where = "files are read at the same path there (--shared)"
        elif address != LOCAL:
            archive, count = pack(project, requests)
            where = f"{counted(count, 'file')} of {absolute(project.root)} sent there ({len(archive) / 1e6:.1f} MB)"
        at_a_time = counted(sum(workers.values()), "unit")
        of = "on this machine" if address == LOCAL else f"of {address}"
        say(f"dask: {counted(len(workers), 'worker')} {of}, {at_a_time} at a time; {where}")

        def accepts(versions: Any) -> bool:
            return forces_versions or not _differences(mine, {"": versions})

        chosen = Workers(client, address, _layout(project, variables, archive), accepts, say)
        yield partial(run_units_on, chosen, most=jobs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log and warnings off our streams: what matters of them is said in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _client(address: str, jobs: int | None) -> Iterator[Client]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise GradctlError(
            "GC155", f"--dask needs Dask, which cannot be imported ({error}): pip install 'gradctl[distributed]'."
        ) from error
    with contextlib.ExitStack() as stack:
        cluster: Any = address
        security = None
        if address != LOCAL:
            security = _ensure_scheduler(address)
        else:
            # Pages of HTTP servers, which nobody asked for.
            settings: dict[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
            stack.enter_context(dask.config.set(settings))
            try:
                with _without_interrupts():
                    cluster = LocalCluster(
                        n_workers=jobs,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",
                        memory_limit=0,
                        silence_logs=logging.CRITICAL,
                        preload=[place.__name__],
                    )
            except Exception as error:  # of processes, ports and disks
                what = f"Dask cannot start {counted(jobs or 0, 'worker')} on this machine: {first_line_of(error)}"
                raise GradctlError("GC155", f"{what}. Use fewer --jobs, or run without --dask.") from error
            stack.enter_context(cluster)
        client = Client(cluster, security=security, timeout=_CONNECT_SECONDS, set_as_default=False)
        stack.callback(client.close, timeout=2)
        yield client


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C waiting: the threads and processes that are started do not receive it, until these ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # would unblock it for the processes that follow
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ensure_scheduler(address: str) -> Security:
    """Return the security of Dask's configuration, with which a scheduler answers.

    A client that cannot connect is closed after 16 s only, with a traceback.
    """
    from distributed import Security
    from distributed.core import rpc

    async def kind() -> str:
        async with rpc(address, connection_args=security.get_connection_args("client")) as server:
            return str((await server.identity())["type"])

    try:
        security = Security()
        found = asyncio.run(asyncio.wait_for(kind(), _CONNECT_SECONDS))
    except Exception as error:  # of sockets, TLS, addresses, and of what something else answers
        said = f"no answer in {_CONNECT_SECONDS} s" if isinstance(error, TimeoutError) else first_line_of(error)
    else:
        if found == "Scheduler":
            return security
        said = f"a {found.lower()} answers"
    what = f"the Dask scheduler {address!r} cannot be reached: {said}. Give its address: --dask tcp://HOST:8786."
    raise GradctlError("GC155", what)


def _workers(client: Client, address: str) -> dict[str, int]:
    """Return the threads of each worker by its address."""
    deadline = time.monotonic() + _WORKER_SECONDS
    while not (workers := client.nthreads()):
        if time.monotonic() > deadline:
            raise GradctlError("GC155", f"the cluster {address} has no workers. Start some: dask worker {address}.")
        time.sleep(0.1)
    return dict(workers)


def _differences(mine: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what workers have other than this machine, each once with the first of its workers; nothing if none is."""
    workers = defaultdict(list)
    for worker, theirs in found.items():
        if isinstance(theirs, BaseException):
            workers[f"gradctl {mine['gradctl']} cannot be imported ({first_line_of(theirs)})"].append(worker)
            continue
        for name, version in mine.items():
            if theirs.get(name) != version:
                workers[f"{name} {theirs.get(name) or 'is missing'} (here {version})"].append(worker)
    return "; ".join(f"{what} on {listed(names, 1)}" for what, names in workers.items())


def _layout(project: Project, variables: Mapping[str, str | None], archive: bytes | None) -> Layout:
    """Return the folders that units have without Dask, and the variables."""
    root, current = absolute(project.root), Path.cwd()
    inside = [each for each in map(Path, sys.path) if any(each.is_relative_to(folder) for folder in (root, current))]
    # Not the packages of an environment in the project's folder.
    own = (sys.prefix, sys.base_prefix)
    imports = [str(each) for each in (*inside, root) if not any(each.is_relative_to(folder) for folder in own)]
    return Layout(root, root.resolve(), Surroundings(current, tuple(dict.fromkeys(imports)), variables), archive)
