"""Run many units, each in a process of its own: none can hang or crash another, or the run.

A thread starts each process and waits for it; the caller's thread receives the results. Nothing here imports torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from gradctl.core.findings import Unit
from gradctl.isolation.cleanup import remove_at_end
from gradctl.isolation.protocol import UnitRequest
from gradctl.isolation.unit_process import UnitProcess


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; ``units`` are in the order of their requests, None for those that were not complete."""

    def __init__(self, units: Sequence[Unit | None]) -> None:
        super().__init__()
        self.units = tuple(units)


def run_units(
    requests: Sequence[UnitRequest],
    *,
    jobs: int = 1,
    on_start: Callable[[UnitRequest], None] | None = None,
    on_result: Callable[[UnitRequest, Unit], None] | None = None,
) -> list[Unit]:
    """Return one unit a request, in their order, whatever their processes do.

    A process that crashes, hangs or runs out of memory returns an ``inconclusive`` unit with a finding GC801, GC802 or
    GC803, and the end of its output as details. Nothing that a process prints reaches the streams of this one.

    Args:
        requests: what to check.
        jobs: how many processes run at a time, at least one.
        on_start: called with each request before its process starts, in a thread of its own.
        on_result: called with each request and its unit as soon as that is complete, in the caller's thread.

    Raises:
        Interrupted: on the first Ctrl-C, after the processes are ended; a second one does not wait for them.
    """
    with start_units(requests, jobs=jobs, on_start=on_start) as wait:
        return wait(on_result)


@contextmanager
def start_units(
    requests: Sequence[UnitRequest], *, jobs: int = 1, on_start: Callable[[UnitRequest], None] | None = None
) -> Iterator[Callable[[Callable[[UnitRequest, Unit], None] | None], list[Unit]]]:
    """Start the processes of some units, and provide the function that waits for them, as ``run_units``.

    The caller can do something else meanwhile; if it raises, the processes are ended. Arguments and errors are those
    of ``run_units``.
    """
    folder = Path(tempfile.mkdtemp(prefix="gradctl-")).resolve()
    with remove_at_end(folder):
        processes = [UnitProcess(request, folder / str(index)) for index, request in enumerate(requests)]
        pool = ThreadPoolExecutor(jobs)

        def run(request: UnitRequest, process: UnitProcess) -> Unit | None:
            if on_start is not None:
                on_start(request)
            return process.run()

        futures = {pool.submit(run, *pair): pair[0] for pair in zip(requests, processes, strict=True)}

        def wait(on_result: Callable[[UnitRequest, Unit], None] | None = None) -> list[Unit]:
            for future in as_completed(futures):
                unit = future.result()
                if unit is not None and on_result is not None:
                    on_result(futures[future], unit)
            return [unit for each in futures if (unit := each.result()) is not None]

        try:
            yield wait
        except BaseException as error:
            _stop(pool, processes)
            if isinstance(error, KeyboardInterrupt):
                ended = [
                    None if each.cancelled() or each.exception() is not None else each.result() for each in futures
                ]
                raise Interrupted(ended) from error
            raise
        pool.shutdown()


def _stop(pool: ThreadPoolExecutor, processes: Sequence[UnitProcess]) -> None:
    """Start no more processes and end those that run; interrupted again, kill them and do not wait."""
    pool.shutdown(wait=False, cancel_futures=True)
    try:
        for process in processes:
            process.stop()
        pool.shutdown()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
