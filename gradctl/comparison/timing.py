"""Durations: of eager and of a form, and of ONNX graphs. Calls are made in turn, so that load affects all alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradctl.comparison.program import cotangents_of
from gradctl.comparison.reference import Reference
from gradctl.core.findings import Timing
from gradctl.core.optimization import Latency
from gradctl.forms.eager import capture as capture_eager
from gradctl.forms.form import Captured, take_gradient
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import run
from gradctl.subject.instance import Instance

_MOST_PAIRS = 7
_SECONDS = 0.5
_MOST_SESSION_RUNS, _FEWEST_SESSION_RUNS, _SESSION_SECONDS = 50, 3, 1.0


def timing_of(captured: Captured, reference: Reference) -> Timing | None:
    """Return what a call of the form and of eager takes, forward, and forward and backward; None if it raises."""
    instance = reference.instance()
    eager = capture_eager(instance)
    try:
        forward = _interleaved(lambda: _forward(captured, instance), lambda: _forward(eager, instance))
        training = (
            _interleaved(lambda: _training(captured, instance), lambda: _training(eager, instance))
            if "gradient" in captured.quantities
            else (None, None, None)
        )
    except Exception:  # the form may raise; then the comparison says so
        return None
    return Timing(
        capture=captured.seconds,
        forward=forward[0],
        eager_forward=forward[1],
        training=training[0],
        eager_training=training[1],
        forward_noise=forward[2],
        training_noise=training[2],
    )


def _forward(form: Captured, instance: Instance) -> None:
    with torch.no_grad():
        args, kwargs = instance.inputs()
        instance.call(form.call, args, kwargs)


def _training(form: Captured, instance: Instance) -> None:
    args, kwargs = instance.inputs()
    outputs = {name: t for name, t in instance.call(form.call, args, kwargs) if t.requires_grad}
    if outputs:
        cotangents = cotangents_of(outputs, instance.subject.seed)
        torch.autograd.backward([outputs[name] for name in cotangents], list(cotangents.values()))
    for leaf in instance.leaves:
        take_gradient(leaf, form)


def _interleaved(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, float | None]:
    """Return the medians of some pairs of calls, and the noise of their ratio."""
    taken = _in_turn([first, second], fewest=1, most=_MOST_PAIRS, seconds=_SECONDS)
    ratios = [eager / form for form, eager in zip(*taken, strict=True)]
    noise = None
    if len(ratios) > 1:
        lower, _, upper = statistics.quantiles(ratios, method="inclusive")
        noise = (upper - lower) / 2
    return statistics.median(taken[0]), statistics.median(taken[1]), noise


def _in_turn(calls: Sequence[Callable[[], object]], *, fewest: int, most: int, seconds: float) -> list[list[float]]:
    """Return the seconds of some rounds of calls in turn, so that a busy machine hits all alike, after one to warm up.

    Args:
        calls: what is timed.
        fewest, most: rounds.
        seconds: after which no round is begun, but for the fewest.
    """
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < fewest or (len(taken[0]) < most and time.perf_counter() < end):
        for call, kept in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return taken


def latencies(
    files: Sequence[OnnxFile], feeds: Mapping[str, Tensor], *, seconds: float = _SESSION_SECONDS
) -> list[Latency]:
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
    return _in_turn(calls, fewest=_FEWEST_SESSION_RUNS, most=_MOST_SESSION_RUNS, seconds=seconds)


def _latency(*turns: Sequence[float]) -> Latency:
    lower, median, upper = map(statistics.mean, zip(*map(statistics.quantiles, turns), strict=True))
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=sum(map(len, turns)))
