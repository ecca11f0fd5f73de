"""Durations: of eager and of a form, and of ONNX graphs. Calls are made in turn, so that load affects all alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import onnxruntime
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

T = TypeVar("T")

_MOST_PAIRS = 7
_SECONDS = 0.5
_MOST_SESSION_RUNS, _FEWEST_SESSION_RUNS, _SESSION_SECONDS = 50, 3, 1.0


def timing_of(captured: Captured, reference: Reference) -> Timing | None:
    """Return the time of a call of the form and of eager, forward, and forward and backward; None if it raises.

    If the form has gradients, both are of one training step: a call under ``no_grad`` would be compiled for itself.
    """
    instance, has_gradients = reference.instance(), "gradient" in captured.quantities
    forms = [captured, capture_eager(instance)]
    try:
        steps = _in_turn(
            [functools.partial(_step, form, instance, has_gradients) for form in forms],
            fewest=1,
            most=_MOST_PAIRS,
            seconds=_SECONDS,
        )
    except Exception:  # the form may raise; then the comparison says so
        return None
    forward, eager_forward, forward_noise = _medians_and_noise(steps, 0)
    training, eager_training, training_noise = _medians_and_noise(steps, 1) if has_gradients else (None, None, None)
    return Timing(
        capture=captured.seconds,
        forward=forward,
        eager_forward=eager_forward,
        training=training,
        eager_training=eager_training,
        forward_noise=forward_noise,
        training_noise=training_noise,
    )


def _step(form: Captured, instance: Instance, has_gradients: bool) -> tuple[float, float]:
    """Return the seconds of a forward, and of it and the backward."""
    start = time.perf_counter()
    with torch.set_grad_enabled(has_gradients):
        args, kwargs = instance.inputs()
        outputs = {name: t for name, t in instance.call(form.call, args, kwargs) if t.requires_grad}
    forward = time.perf_counter() - start
    cotangents = cotangents_of(outputs, instance.subject.seed)
    start = time.perf_counter()
    if outputs:
        torch.autograd.backward([outputs[name] for name in cotangents], list(cotangents.values()))
    for leaf in instance.leaves:
        take_gradient(leaf, form)
    return forward, forward + time.perf_counter() - start


def _medians_and_noise(steps: Sequence[Sequence[tuple[float, float]]], part: int) -> tuple[float, float, float | None]:
    """Return the medians of one part of the steps of the form and of eager, and the noise of their ratio."""
    form, eager = ([step[part] for step in each] for each in steps)
    noise = None
    if len(form) > 1:
        ratios = [theirs / own for own, theirs in zip(form, eager, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, method="inclusive")
        noise = (upper - lower) / 2
    return statistics.median(form), statistics.median(eager), noise


def _in_turn(calls: Sequence[Callable[[], T]], *, fewest: int, most: int, seconds: float) -> list[list[T]]:
    """Return what some rounds of calls in turn return, after one to warm up.

    Args:
        calls: each returns its own seconds.
        fewest, most: rounds.
        seconds: after which no round is begun, but for the fewest.
    """
    for call in calls:
        call()
    taken: list[list[T]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < fewest or (len(taken[0]) < most and time.perf_counter() < end):
        for call, kept in zip(calls, taken, strict=True):
            kept.append(call())
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
    calls = [functools.partial(_run_seconds, session(file), feeds) for file in files]
    return _in_turn(calls, fewest=_FEWEST_SESSION_RUNS, most=_MOST_SESSION_RUNS, seconds=seconds)


def _run_seconds(running: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor]) -> float:
    start = time.perf_counter()
    run(running, feeds)
    return time.perf_counter() - start


def _latency(*turns: Sequence[float]) -> Latency:
    lower, median, upper = map(statistics.mean, zip(*map(statistics.quantiles, turns), strict=True))
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=sum(map(len, turns)))
