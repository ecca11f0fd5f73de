"""How long onnxruntime takes for some graphs, its optimiser on: runs in turn, so that a busy machine hits all alike."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from gradctl.comparison.timing import in_turn
from gradctl.core.optimization import Latency
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import run

__all__ = ["latencies"]

_MOST_RUNS = 50
_FEWEST_RUNS = 3
_SECONDS = 1.0


def latencies(files: Sequence[OnnxFile], feeds: Mapping[str, Tensor], *, seconds: float = _SECONDS) -> list[Latency]:
    """Return the median and the quartiles of each file, of runs in turn.

    Sessions are made in the order of the files, and again in the reverse of it; a quartile is the mean of both times:
    of one graph in several sessions, those made later are up to 7 % faster (tiny transformers, onnxruntime 1.32).

    Args:
        files: what is run.
        feeds: the inputs.
        seconds: about how long to measure in all; each is run at least a few times.
    """
    there = _runs(files, feeds, seconds / 2)
    back = _runs(files[::-1], feeds, seconds / 2)[::-1]
    return [_latency(*pair) for pair in zip(there, back, strict=True)]


def _runs(files: Sequence[OnnxFile], feeds: Mapping[str, Tensor], seconds: float) -> list[list[float]]:
    calls = [functools.partial(run, session(file), feeds) for file in files]
    return in_turn(calls, fewest=_FEWEST_RUNS, most=_MOST_RUNS, seconds=seconds)


def _latency(*turns: Sequence[float]) -> Latency:
    lower, median, upper = map(statistics.mean, zip(*map(statistics.quantiles, turns), strict=True))
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=sum(map(len, turns)))
