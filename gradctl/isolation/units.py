"""Many units, each in a process of its own: none can hang or crash another, or the run.

A unit is started by a thread that waits for it; the caller's thread takes the results. Nothing here imports torch.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gradctl.core.findings import Unit
from gradctl.isolation.cleanup import cleared
from gradctl.isolation.protocol import UnitRequest
from gradctl.isolation.unit_process import UnitProcess

__all__ = ["Interrupted", "UnitRequest", "run_units"]


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; ``units`` are in the order of their requests, None for those that were not complete."""

    def __init__(self, units: Sequence[Unit | None]) -> None:
        super().__init__()
        self.units = tuple(units)


def run_units(
    requests: Sequence[UnitRequest], *, jobs: int = 1, on_result: Callable[[Unit], None] | None = None
) -> list[Unit]:
    """Return one unit a request, in their order, whatever their processes do.

    What crashes, hangs or runs out of memory is an ``inconclusive`` unit with a finding GC801, GC802 or GC803, and the
    end of what the process wrote as its details. Nothing that a process prints reaches this one's streams.

    Args:
        requests: what to check.
        jobs: how many processes run at a time, at least one.
        on_result: called with each unit as soon as it is there, in the caller's thread.

    Raises:
        Interrupted: on the first Ctrl-C, after the processes are ended; a second one does not wait for them.
    """
    folder = Path(tempfile.mkdtemp(prefix="gradctl-")).resolve()
    with cleared(folder):
        run = _Run([UnitProcess(request, folder / str(index)) for index, request in enumerate(requests)], jobs)
        try:
            while run.is_going():
                unit = run.take()
                if unit is not None and on_result is not None:
                    on_result(unit)
        except BaseException as error:
            run.stop()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(run.units()) from error
            raise
    return [unit for unit in run.units() if unit is not None]


class _Run:
    """The processes of one run: those that wait, and what has come of the others."""

    def __init__(self, processes: Sequence[UnitProcess], jobs: int) -> None:
        self._processes = processes
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[int, Unit | Exception | None]] = queue.SimpleQueue()
        self._taken: dict[int, Unit | None] = {}
        for index in range(len(processes)):
            self._waiting.put(index)
        # Daemons: after the second Ctrl-C nothing waits for them, and the processes end with them.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(jobs, len(processes)))]
        for thread in self._threads:
            thread.start()

    def is_going(self) -> bool:
        return len(self._taken) < len(self._processes)

    def take(self) -> Unit | None:
        """Return the next unit that ends; None for one that was stopped. What broke in its thread is raised here."""
        index, ended = self._ended.get()
        if isinstance(ended, Exception):
            raise ended
        self._taken[index] = ended
        return ended

    def units(self) -> list[Unit | None]:
        """Return the units in the order of the requests, None for those that are not complete."""
        return [self._taken.get(index) for index in range(len(self._processes))]

    def stop(self) -> None:
        """Start no more, end what runs, and take what is complete; interrupted again, kill and do not wait."""
        try:
            for process in self._processes:
                process.stop()
            for thread in self._threads:
                thread.join()
        except KeyboardInterrupt:
            for process in self._processes:
                process.kill()
            raise
        while not self._ended.empty():
            index, ended = self._ended.get()
            self._taken[index] = None if isinstance(ended, Exception) else ended

    def _work(self) -> None:
        while True:
            try:
                index = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._ended.put((index, self._processes[index].run()))
            except Exception as error:  # nobody sees what a thread raises: the caller's must
                self._ended.put((index, error))
