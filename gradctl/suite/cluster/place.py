"""In the process of a Dask worker: the place of a run, where its units run in processes of their own.

Dask cannot interrupt a task that runs. A place watches a key that the run's client holds in the worker's memory: the
scheduler releases it when the client closes or its connection breaks, also by kill -9. Then the place ends its
processes and removes its files. If the process of the worker dies, ``remove_at_end`` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradctl.isolation.cleanup import Surroundings, remove_at_end
from gradctl.isolation.protocol import UnitRequest, decode, encode
from gradctl.isolation.unit_process import UnitProcess
from gradctl.suite.cluster.shipment import Shipped
from gradctl.suite.journal import versions

_WATCH_SECONDS = 0.25
_WORKS = ("running", "paused", "closing_gracefully")  # the statuses of a worker whose tasks go on

_places: dict[str, Place] = {}


@dataclass(frozen=True, slots=True)
class Layout:
    """What a place is made of.

    Attributes:
        root: the folder of the configuration.
        real: the same without links.
        surroundings: of each process.
        archive: the files in ``root``; None if the worker has them at the same path.
    """

    root: Path
    real: Path
    surroundings: Surroundings
    archive: bytes | None = None


async def dask_setup(worker: Any) -> None:
    """Let Ctrl-C in a terminal end the run through its supervisor alone; Dask calls this in its local workers."""
    signal.signal(signal.SIGINT, lambda *_: None)  # ignored, it would be ignored in the processes of units, too
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def worker_versions() -> dict[str, str | int | None]:
    """Return the versions that are compared with those of the machine that starts the run."""
    import distributed

    return {**versions(), "distributed": distributed.__version__}


async def enter(keys: Mapping[str, str], layout: Layout, dask_worker: Any) -> None:
    """Make the place of a run in the process of a worker.

    Args:
        keys: the key to watch, by the address of the worker; the name of its place.
        layout: what the place is made of.
        dask_worker: the worker; Dask sets it.

    Raises:
        OSError: its folder cannot be written.
    """
    key = keys[dask_worker.contact_address]
    _places[key] = await asyncio.to_thread(Place, dask_worker, key, layout)


def run_at(key: str, request: bytes) -> bytes | str | None:
    """Return the unit of a request, both as JSON; or why it could not be run; None if its place is gone."""
    place = _places.get(key)
    try:
        return place.run(request) if place is not None else None
    except Exception as error:  # of a full disk, or of a request by another version of gradctl
        return f"{type(error).__name__}: {error}"


class Place:
    """Where the units of one run run on a worker."""

    def __init__(self, worker: Any, key: str, layout: Layout) -> None:
        self._worker, self._key = worker, key
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._processes: set[UnitProcess] | None = set()  # None once the place is closed
        self._end = contextlib.ExitStack()
        self._folder = Path(tempfile.mkdtemp(prefix="gradctl-", dir=worker.local_directory)).resolve()
        self._end.enter_context(remove_at_end(self._folder))
        self._shipped: Shipped | None = None
        self._surroundings = layout.surroundings
        if layout.archive is not None:
            self._shipped = Shipped(self._folder / "files", layout.root, layout.real, layout.archive)
            self._surroundings = self._moved(layout.surroundings, self._shipped)
        threading.Thread(target=self._watch, daemon=True).start()

    def run(self, request: bytes) -> bytes | None:
        """Return the unit of a request, both as JSON; None if the place was closed before it ended."""
        moved = request if self._shipped is None else self._shipped.moved(request)
        folder = self._folder / str(next(self._numbers))
        process = UnitProcess(decode(moved, UnitRequest), folder, self._surroundings)
        with self._lock:
            if self._processes is None:
                return None
            self._processes.add(process)
        try:
            unit = process.run()
        finally:
            with self._lock:
                if self._processes is not None:
                    self._processes.remove(process)
            shutil.rmtree(folder, ignore_errors=True)
        if unit is None:
            return None
        return encode(unit) if self._shipped is None else self._shipped.moved_back(encode(unit))

    @staticmethod
    def _moved(surroundings: Surroundings, shipped: Shipped) -> Surroundings:
        """Return the surroundings below the folder of shipped files; folders that are not there stay as they are."""
        current = surroundings.current and shipped.below(surroundings.current)
        if current is not None:
            current.mkdir(parents=True, exist_ok=True)
        imports = tuple(str(shipped.below(Path(each))) for each in surroundings.imports)
        return replace(surroundings, current=current, imports=imports)

    def _watch(self) -> None:
        while self._is_wanted():
            time.sleep(_WATCH_SECONDS)
        _places.pop(self._key, None)
        with self._lock:
            processes, self._processes = self._processes or (), None
        for process in processes:
            process.stop()
            process.kill()
        self._end.close()

    def _is_wanted(self) -> bool:
        task = self._worker.state.tasks.get(self._key)
        return task is not None and task.state == "memory" and self._worker.status.name in _WORKS
