"""Run units on the workers of a cluster, at most as many as these have threads, and again where a worker was lost.

Which units a lost worker ran, and how often, is counted here: Dask would count it against all that were sent to it.
They run again when the others have ended, each alone on its host, so that one that ends its worker harms no other.
"""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradctl.core.findings import Unit
from gradctl.isolation.protocol import UnitRequest, decode, encode, inconclusive_unit
from gradctl.isolation.units import Interrupted
from gradctl.suite.cluster.workers import ClusterLost, Workers

if TYPE_CHECKING:
    from distributed import Future

_MOST_LOSSES = 3
_WAIT_SECONDS = 1.0
_HINT = "look into the log of the worker, and whether its machine has enough memory: gradctl explain GC155."


@dataclass(frozen=True, slots=True)
class _Sent:
    """A unit that a worker runs."""

    index: int
    address: str
    future: Future


def run_units_on(
    workers: Workers,
    requests: Sequence[UnitRequest],
    *,
    most: int | None = None,
    on_start: Callable[[UnitRequest], None] | None = None,
    on_result: Callable[[UnitRequest, Unit], None] | None = None,
) -> list[Unit]:
    """Return one unit a request, in their order, as ``isolation.units.run_units``.

    A unit whose worker was lost three times is ``crashed``, with a finding GC801.

    Args:
        workers: of the cluster.
        requests: what to check.
        most: how many units run at a time; None for as many as the workers have threads.
        on_start: called with each request before it is sent, and again if its worker was lost.
        on_result: called with each request and its unit as soon as that is complete.

    Raises:
        Interrupted: on Ctrl-C; with a ``ClusterLost`` as its cause, if the scheduler or all workers are gone.
    """
    run = _Run(workers, requests, len(requests) if most is None else most, on_start)
    units: list[Unit | None] = [None] * len(requests)
    try:
        while run.goes_on():
            for index, unit in run.step():
                units[index] = unit
                if on_result is not None:
                    on_result(requests[index], unit)
    except BaseException as error:
        workers.leave()
        if isinstance(error, KeyboardInterrupt | ClusterLost):
            raise Interrupted(units) from error
        raise
    return [unit for unit in units if unit is not None]


class _Run:
    """The units of one call: those that wait, those that were sent, and those that were lost with a worker."""

    def __init__(
        self,
        workers: Workers,
        requests: Sequence[UnitRequest],
        most: int,
        on_start: Callable[[UnitRequest], None] | None,
    ) -> None:
        self._workers, self._requests, self._most, self._on_start = workers, requests, most, on_start
        self._waiting, self._again = deque(range(len(requests))), deque[int]()
        self._sent: dict[str, _Sent] = {}
        self._losses = Counter[int]()
        self._ended: queue.SimpleQueue[tuple[str, bytes | str | BaseException | None]] = queue.SimpleQueue()

    def goes_on(self) -> bool:
        """Return whether a unit has not ended."""
        return bool(self._waiting or self._again or self._sent)

    def step(self) -> list[tuple[int, Unit]]:
        """Send what there is room for, wait for an end, at most a second, and return the units that ended."""
        gone = self._workers.look()
        units = self._lost([key for key, each in self._sent.items() if each.address in gone])
        self._send()
        try:
            key, answer = self._ended.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            return units
        if key not in self._sent:  # of a worker that was lost just now
            return units
        if not isinstance(
            answer, bytes | str
        ):  # the task was lost, or its place is gone: the worker is another process
            self._workers.forget(self._sent[key].address)
            return units + self._lost([key])
        sent = self._sent.pop(key)
        sent.future.release()
        self._send()  # before anything is written: workers do not wait for the journal
        if isinstance(answer, bytes):
            return [*units, (sent.index, decode(answer, Unit))]
        reason = f"the Dask worker {sent.address} could not run the unit: {answer}"
        return [*units, (sent.index, inconclusive_unit(self._requests[sent.index], "error", "GC155", reason))]

    def _send(self) -> None:
        """Send units as long as there is room; those that were lost with a worker when no other waits."""
        while len(self._sent) < self._most and (self._waiting or self._again):
            busy = [each.address for each in self._sent.values()]
            address = self._workers.free(busy, alone=not self._waiting)
            if address is None:
                return
            index = (self._waiting or self._again).popleft()
            request = self._requests[index]
            if self._on_start is not None:
                self._on_start(request)
            future = self._workers.send(address, encode(request))
            self._sent[future.key] = _Sent(index, address, future)
            future.add_done_callback(self._has_ended)

    def _has_ended(self, future: Future) -> None:
        """Fetch what a task returned, in Dask's thread of callbacks; it waits if the worker is lost meanwhile."""
        try:
            self._ended.put((future.key, future.result()))
        except BaseException as error:  # of the task, or that it was cancelled or lost
            self._ended.put((future.key, error))

    def _lost(self, keys: Sequence[str]) -> list[tuple[int, Unit]]:
        """Let units of lost workers run again; return those that have lost too many."""
        ended = []
        for key in keys:
            sent = self._sent.pop(key)
            sent.future.cancel()
            self._losses[sent.index] += 1
            if self._losses[sent.index] < _MOST_LOSSES:
                self._again.append(sent.index)
                continue
            reason = f"the Dask worker that ran the unit was lost {_MOST_LOSSES} times, the last one was {sent.address}"
            request = self._requests[sent.index]
            ended.append((sent.index, inconclusive_unit(request, "crashed", "GC801", reason, hint=_HINT)))
        return ended
