"""The workers of a Dask cluster that have a place for the run: which come, which are lost, and what is sent to them."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gradctl.core.errors import GradctlError, first_line_of
from gradctl.suite.cluster.place import Layout, enter, run_at, worker_versions

if TYPE_CHECKING:
    from distributed import Client, Future

_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0  # without a worker: those of a cluster may be restarted
_SCATTER_SECONDS = 10


class ClusterLost(GradctlError):
    """The scheduler, or every worker, is gone; the units that were complete are reported."""

    exit_code = 4


class Workers:
    """The workers of a cluster.

    Args:
        client: of Dask.
        name: of the cluster, for messages.
        layout: of the place on each worker.
        accepts: whether a worker with these versions may run units.
        say: called with what the user should know.
    """

    def __init__(
        self, client: Client, name: str, layout: Layout, accepts: Callable[[Any], bool], say: Callable[[str], None]
    ) -> None:
        self._client, self._name, self._layout, self._accepts, self._say = client, name, layout, accepts, say
        self._run, self._numbers = f"gradctl-{uuid.uuid4().hex}", itertools.count()
        self._threads: dict[str, int] = {}
        self._places: dict[str, Future] = {}  # what each place watches, by the address of its worker
        self._refused: set[str] = set()
        self._last_look, self._last_seen = 0.0, time.monotonic()

    def look(self) -> set[str]:
        """Return the addresses of workers that were lost since the last look, and make a place on those that came.

        Raises:
            ClusterLost: GC155 if the scheduler does not answer, or no worker was there for a minute.
        """
        now = time.monotonic()
        if now < self._last_look + _LOOK_SECONDS:
            return set()
        with self._scheduler_answers():
            threads = dict(self._client.nthreads())
            lost = self._places.keys() - threads.keys()
            for address in lost:
                self._say(f"dask: the worker {address} was lost")
                self.forget(address)
            self._refused &= threads.keys()
            self._enter(threads.keys() - self._places.keys() - self._refused)
        self._threads = {address: count for address, count in threads.items() if address in self._places}
        self._last_look = time.monotonic()
        self._last_seen = self._last_look if self._threads else self._last_seen
        if now > self._last_seen + _PATIENCE_SECONDS:
            what = f"no worker of {self._name} can be used since {_PATIENCE_SECONDS:g} s"
            raise ClusterLost("GC155", f"{what}. Start workers, and run again; with --resume if --report was given.")
        return lost

    def forget(self, address: str) -> None:
        """Make a new place on a worker before it runs something else: its process may be another one."""
        self._places.pop(address, None)
        self._threads.pop(address, None)

    def leave(self) -> None:
        """Close the places: each ends its units within a second."""
        for future in self._places.values():
            future.release()
        self._places, self._threads = {}, {}

    def free(self, busy: Collection[str], *, alone: bool) -> str | None:
        """Return the address of a worker with a free thread, the most idle one; ``alone``, if its host has no unit.

        ``busy`` has the address of a worker for each unit that runs.
        """
        if alone:
            hosts = {urlsplit(address).hostname for address in busy}
            return next((each for each in self._threads if urlsplit(each).hostname not in hosts), None)
        units = Counter(busy)
        best = max(self._threads, key=lambda each: self._threads[each] - units[each], default=None)
        return best if best is not None and units[best] < self._threads[best] else None

    def send(self, address: str, request: bytes) -> Future:
        """Send a request to one worker, and to no other, whatever happens to it; raise as ``look``."""
        key = f"{self._run}-unit-{next(self._numbers)}"
        with self._scheduler_answers():
            return self._client.submit(run_at, self._places[address].key, request, key=key, workers=[address])

    @contextmanager
    def _scheduler_answers(self) -> Iterator[None]:
        """Raise ClusterLost for whatever Dask raises."""
        try:
            yield
        except Exception as error:  # of sockets, and of a client that has given up
            what = f"the scheduler {self._name} no longer answers: {first_line_of(error)}"
            message = f"{what}. Run again when it does; with --resume if --report was given."
            raise ClusterLost("GC155", message) from error

    def _enter(self, addresses: Collection[str]) -> None:
        """Make a place on each worker that has the right versions; those that are lost meanwhile are left out."""
        if not addresses:
            return
        places: dict[str, Future] = {}
        found = self._client.run(worker_versions, workers=list(addresses), on_error="return")
        for address, versions in found.items():
            if not self._accepts(versions):
                self._refused.add(address)
                self._say(f"dask: the worker {address} has other versions, and is not used")
                continue
            key = f"{self._run}-place-{next(self._numbers)}"
            try:
                places |= {address: self._client.scatter({key: b""}, workers=[address], timeout=_SCATTER_SECONDS)[key]}
            except Exception:  # the worker is lost again: the next look says so
                continue
        keys = {address: future.key for address, future in places.items()}
        entered = self._client.run(enter, keys, self._layout, workers=list(keys), on_error="return") if keys else {}
        for address, error in entered.items():
            if error is None:
                self._places[address] = places[address]
            else:
                self._refused.add(address)
                self._say(f"dask: the worker {address} is not used: {first_line_of(error)}")
