"""Dynamic against static: what does a form buy? Calls of eager and of the form in turn, the median of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gradctl.checks.outcomes import cotangents_of
from gradctl.checks.reference import Reference
from gradctl.core.findings import Timing
from gradctl.forms.eager import capture as capture_eager
from gradctl.forms.form import Captured, gradient_of
from gradctl.subject.instance import Instance

__all__ = ["timing_of"]

_PAIRS = 7
_SECONDS = 0.5


def timing_of(captured: Captured, reference: Reference) -> Timing | None:
    """Return what a call of the form and of eager takes, forward, and forward and backward; None if it raises."""
    instance = reference.instance()
    eager = capture_eager(instance)
    try:
        forward = _interleaved(lambda: _forward(captured, instance), lambda: _forward(eager, instance))
        training = (
            _interleaved(lambda: _training(captured, instance), lambda: _training(eager, instance))
            if "gradient" in captured.gives
            else (None, None)
        )
    except Exception:  # the form may raise; then the comparison says so
        return None
    return Timing(
        capture=captured.seconds,
        forward=forward[0],
        eager_forward=forward[1],
        training=training[0],
        eager_training=training[1],
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
        gradient_of(leaf, form)


def _interleaved(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Return the medians of some pairs of calls, after one of each to warm up."""
    first()
    second()
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + _SECONDS
    while len(seconds[0]) < _PAIRS and (time.perf_counter() < end or not seconds[0]):
        for call, kept in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
