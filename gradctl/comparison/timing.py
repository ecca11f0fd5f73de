"""Durations: of eager and of a form, and of ONNX graphs. Calls are made in turn, so that load affects all alike."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import onnxruntime
import torch
from torch import Tensor
from torch.utils.benchmark import timer

from gradctl.comparison.program import cotangents_of
from gradctl.comparison.reference import Reference
from gradctl.core.findings import Timing
from gradctl.core.optimization import Latency
from gradctl.forms.eager import capture as capture_eager
from gradctl.forms.form import Captured, gradient_tensors
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import run
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.tree import leaves

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")

_MOST_PAIRS = 7
_SECONDS = 0.5
_MOST_SESSION_RUNS, _FEWEST_SESSION_RUNS, _SESSION_SECONDS = 50, 3, 1.0


class Step(NamedTuple):
    """The seconds of a forward, and of it and the backward; and whether another process took a core meanwhile."""

    forward: float
    training: float
    is_disturbed: bool = False


@dataclass(slots=True, eq=False)
class TimedStep:
    """One form on the inputs of a private copy: a call is one training step, or a forward under ``no_grad``.

    Copies of inputs, cotangents and the removal of gradients are not timed, nor are names of outputs.
    """

    captured: Captured
    instance: Instance
    has_gradients: bool
    _gradients: list[Tensor] = field(init=False)
    _clock: Callable[[], float] = field(init=False)
    _cotangents: tuple[object, list[Tensor]] | None = None
    _given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gradients = [each for leaf in self.instance.leaves for each in gradient_tensors(leaf, self.captured)]
        used = [*self._gradients, *(each for _, each in leaves(self.instance.inputs()) if isinstance(each, Tensor))]
        # The former waits for the accelerator, which it would start for a model on the CPU.
        self._clock = timer if any(each.device.type != "cpu" for each in used) else time.perf_counter

    def __call__(self) -> Step:
        """Return the times of one step."""
        args, kwargs = self._inputs()
        switches = _switches()
        with torch.set_grad_enabled(self.has_gradients):
            start = self._clock()
            value = self.instance.value_of(self.captured.call, args, kwargs)
            forward = self._clock() - start
        if not self.has_gradients:
            return Step(forward, forward, _switches() > switches)
        outputs = [(name, each) for name, each in self.instance.named_outputs(value) if each.requires_grad]
        tensors, cotangents = [each for _, each in outputs], self._cotangents_for(outputs)
        start = self._clock()
        if tensors:
            torch.autograd.backward(tensors, cotangents)
        training = forward + self._clock() - start
        is_disturbed = _switches() > switches
        for tensor in self._gradients:
            tensor.grad = None
        return Step(forward, training, is_disturbed)

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of one call: those of the last one if it could not, or did not, change them."""
        if self._given is None or any(each.grad_fn or each._version != version for each, version in self._versions):
            args, kwargs = self.instance.inputs()
            values = [*args, *kwargs.values()]
            self._versions = [(each, each._version) for each in values if isinstance(each, Tensor)]
            is_nested = any(not isinstance(each, Tensor | int | float | str | None) for each in values)
            self._given = None if is_nested else (args, kwargs)
            return args, kwargs
        args, kwargs = self._given
        return args, {**kwargs}

    def _cotangents_for(self, outputs: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Return cotangents in the order of the outputs, drawn once for outputs of the same shapes."""
        key = [(name, each.shape, each.dtype) for name, each in outputs]
        if self._cotangents is None or self._cotangents[0] != key:
            drawn = cotangents_of(dict(outputs), self.instance.subject.seed)
            self._cotangents = key, [drawn[name] for name, _ in outputs]
        return self._cotangents[1]


def timing_of(captured: Captured, reference: Reference) -> Timing | None:
    """Return the time of a call of the form and of eager, forward, and forward and backward; None if it raises.

    If the form has gradients, both are of one training step: a call under ``no_grad`` would be compiled for itself.
    """
    instance, has_gradients = reference.instance(), "gradient" in captured.quantities
    steps = [TimedStep(form, instance, has_gradients) for form in (captured, capture_eager(instance))]
    try:
        rounds = rounds_of(steps, fewest=1, most=_MOST_PAIRS, seconds=_SECONDS, seed=instance.subject.seed)
    except Exception:  # the form may raise; then the comparison says so
        return None
    forward, eager_forward, forward_noise = _medians_and_noise(rounds, "forward")
    training, eager_training, training_noise = (
        _medians_and_noise(rounds, "training") if has_gradients else (None, None, None)
    )
    return Timing(
        capture=captured.seconds,
        forward=forward,
        eager_forward=eager_forward,
        training=training,
        eager_training=eager_training,
        forward_noise=forward_noise,
        training_noise=training_noise,
    )


def medians_of(blocks: Sequence[Sequence[Step]], part: str) -> list[float]:
    """Return the median of one part of the steps in each round, of those that were not disturbed if there are any."""
    kept = ([step for step in block if not step.is_disturbed] or block for block in blocks)
    return [statistics.median(getattr(step, part) for step in block) for block in kept]


def _medians_and_noise(rounds: Sequence[Sequence[Sequence[Step]]], part: str) -> tuple[float, float, float | None]:
    """Return the medians of one part of the steps of the form and of eager, and the noise of their ratio."""
    form, eager = (medians_of(blocks, part) for blocks in rounds)
    noise = None
    if len(form) > 1:
        ratios = [theirs / own for own, theirs in zip(form, eager, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, method="inclusive")
        noise = (upper - lower) / 2
    return statistics.median(form), statistics.median(eager), noise


def rounds_of(
    calls: Sequence[Callable[[], T]],
    *,
    fewest: int,
    most: int,
    seconds: float,
    block_seconds: float = 0.0,
    seed: int | None = None,
) -> list[list[list[T]]]:
    """Return by call what it returns in each round, after one call of each to warm up.

    A round is a block of each call in turn, in the reverse of the order of the round before: load that grows or falls
    affects all alike.

    Args:
        calls: each returns its own seconds.
        fewest, most: rounds.
        seconds: after which no round is begun, but for the fewest.
        block_seconds: after which a block has no further call; it has one at least.
        seed: of all generators, at the beginning of each block.
    """
    for call in calls:
        call()
    taken: list[list[list[T]]] = [[] for _ in calls]
    order = list(zip(calls, taken, strict=True))
    end = time.perf_counter() + seconds
    with _without_collection():
        while len(taken[0]) < fewest or (len(taken[0]) < most and time.perf_counter() < end):
            for call, kept in order:
                if seed is not None:
                    seed_generators(seed)
                kept.append(_block(call, block_seconds))
            order.reverse()
    return taken


def _block(call: Callable[[], T], seconds: float) -> list[T]:
    end = time.perf_counter() + seconds
    found = [call()]
    while time.perf_counter() < end:
        found.append(call())
    return found


def _switches() -> int:
    """Return how often the system has taken a core from a thread of this process; 0 if it does not say (Windows)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0


@contextmanager
def _without_collection() -> Iterator[None]:
    """Let Python collect no garbage in the middle of a call that is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
    rounds = rounds_of(calls, fewest=_FEWEST_SESSION_RUNS, most=_MOST_SESSION_RUNS, seconds=seconds)
    return [[each for (each,) in blocks] for blocks in rounds]


def _run_seconds(running: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor]) -> float:
    start = time.perf_counter()
    run(running, feeds)
    return time.perf_counter() - start


def _latency(*turns: Sequence[float]) -> Latency:
    lower, median, upper = map(statistics.mean, zip(*map(statistics.quantiles, turns), strict=True))
    return Latency(median=median, lower_quartile=lower, upper_quartile=upper, runs=sum(map(len, turns)))
