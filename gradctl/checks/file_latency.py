"""How long onnxruntime takes for some graphs, its optimiser on: runs in turn, so that a busy machine hits all alike."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from gradctl.checks.timing import in_turn
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
    calls = [functools.partial(run, session(file), feeds) for file in files]
    taken = in_turn(calls, fewest=_FEWEST_RUNS, most=_MOST_RUNS, seconds=seconds)
    return [_latency(kept) for kept in taken]


def _latency(seconds: Sequence[float]) -> Latency:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=len(seconds))
