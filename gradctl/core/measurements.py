"""What a form costs, as data: times with their intervals, memory, sizes, and what Dynamo recompiled."""

from __future__ import annotations

import math

import msgspec

from gradctl.core.names import UnitStatus, UnitVerdict


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A median of rounds, and the confidence interval of it: seconds, or a ratio of two times.

    The interval has a coverage of at least 95 %; ``lower`` and ``upper`` are null if there are too few rounds for that.
    """

    median: float
    lower: float | None = None
    upper: float | None = None

    @property
    def margin(self) -> float | None:
        """The distance from the median to the end of the interval that is farther away."""
        if self.lower is None or self.upper is None:
            return None
        return max(self.median - self.lower, self.upper - self.median)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a form costs on the inputs of the example, or at other ``sizes`` of them (``batch=8``).

    ``verdict``, ``status`` and ``reason`` are those of the comparison at these sizes. All times are in seconds.
    ``first_call`` is that after the capture, forward and backward. ``forward`` records for the backward if the form has
    gradients; ``training`` is forward and backward. Ratios are the time of the form divided by that of eager, round by
    round in one process; ``rounds`` is how many there were. ``loaded_bytes`` is what the process held before the
    capture, ``peak_bytes`` the most until the first calls ended: resident memory, on a GPU what torch's allocator gave
    out. ``artifact_bytes`` is the size of the file. ``nodes`` are calls of operators in the graph. ``pays_after`` is the
    number of calls after which capturing was worth it, null if it is not known to be; ``seconds_measured`` is the time
    inside of the calls that were timed, of ``seconds_timing`` that the rounds took.
    """

    sizes: str | None = None
    verdict: UnitVerdict
    status: UnitStatus = "complete"
    reason: str | None = None
    capture: float | None = None
    first_call: float | None = None
    forward: Estimate | None = None
    eager_forward: Estimate | None = None
    forward_ratio: Estimate | None = None
    training: Estimate | None = None
    eager_training: Estimate | None = None
    training_ratio: Estimate | None = None
    rounds: int = 0
    loaded_bytes: int | None = None
    peak_bytes: int | None = None
    artifact_bytes: int | None = None
    nodes: int | None = None
    graph_breaks: int | None = None
    recompilations: int | None = None
    pays_after: int | None = None
    seconds_measured: float = 0.0
    seconds_timing: float = 0.0

    @property
    def ratio(self) -> Estimate | None:
        """The ratio of a training step if there is one, else that of a forward."""
        return self.training_ratio or self.forward_ratio


def calls_to_pay(once: float, per_call: float, eager_per_call: float) -> int | None:
    """Return after how many calls a form has taken less time than eager; None if it never has.

    That is the smallest n ≥ 1 with ``once + n · per_call < n · eager_per_call``.

    Args:
        once: seconds of the capture, and of what the first call takes beyond the others.
        per_call: seconds of a call of the form.
        eager_per_call: seconds of a call of eager.
    """
    gain = eager_per_call - per_call
    return max(1, math.floor(once / gain) + 1) if gain > 0 else None
