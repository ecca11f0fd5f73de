"""How long onnxruntime takes for some graphs, its optimiser on: runs in turn, so that a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from gradctl.core.optimization import Latency
from gradctl.forms.onnx_file import OnnxFile, session
from gradctl.forms.onnx_session import run

__all__ = ["latencies"]

_MOST_RUNS = 101
_FEWEST_RUNS = 5
_SECONDS = 1.0


def latencies(files: Sequence[OnnxFile], feeds: Mapping[str, Tensor], *, seconds: float = _SECONDS) -> list[Latency]:
    """Return the median and the quartiles of each file, of runs in turn.

    Args:
        files: what is run.
        feeds: the inputs.
        seconds: about how long to measure in all; each is run at least a few times.
    """
    sessions = [session(file) for file in files]
    taken: list[list[float]] = [[] for _ in sessions]
    for each in sessions:
        run(each, feeds)  # the first run of a session allocates
    end = time.perf_counter() + seconds
    while len(taken[0]) < _FEWEST_RUNS or (len(taken[0]) < _MOST_RUNS and time.perf_counter() < end):
        for each, kept in zip(sessions, taken, strict=True):
            start = time.perf_counter()
            run(each, feeds)
            kept.append(time.perf_counter() - start)
    return [_latency(kept) for kept in taken]


def _latency(seconds: Sequence[float]) -> Latency:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=len(seconds))
