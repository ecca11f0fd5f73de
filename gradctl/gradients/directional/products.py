"""Whether eager's directional derivatives are those of its gradient, in float64, before a graph is made of them.

A JVP must be the transpose of the VJP: <w, J·v> = <Jᵀ·w, v>, for each output. An HVP must be the derivative of the
gradient along v, which finite differences of the gradient show: a backward that detaches what it saves, for one, has
a right gradient and a wrong second derivative.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.findings import Finding, TensorResult, Unit
from gradctl.core.names import TensorVerdict
from gradctl.core.numbers import number
from gradctl.gradients.baseline import run_native
from gradctl.gradients.float64 import oracle_runner
from gradctl.gradients.functions.attribution import FunctionCheck
from gradctl.joint.derivatives import hvp_of, jvp_of, leaf_names, report_name, twice_differentiable
from gradctl.numerics.ladder import Slope, noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, is_float, norm
from gradctl.numerics.runner import refusals_ignored
from gradctl.subject.frames import first_line
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.model_runner import ModelRunner

_PROBES = 2
# Products of Gaussian vectors, in machine epsilons of the sizes of their factors.
_EPSILONS = 1e5
_APPROXIMATE = 1e-4
# Of the largest HVP: a leaf whose own is zero by cancellation (a bias before batch normalisation) has no other scale.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class _Agreement:
    """How a directional derivative agrees with what it must be."""

    name: str  # of the output, or the leaf
    shape: tuple[int, ...]
    verdict: TensorVerdict
    error: float  # relative
    tolerance: float  # relative


def check_directional(
    subject: Subject, graph: str, wrt: Sequence[str], *, allows: Allows, fail_on: str = "error"
) -> Unit:
    """Return the verdict on eager's directional derivatives of a model, as the unit of the form ``eager``.

    Args:
        subject: the model and its inputs, with its loss inside; not changed.
        graph: ``jvp`` or ``hvp``.
        wrt: the leaves, as in ``derivative_subject``.
        allows: accepted findings.
        fail_on: the severity from which a finding fails the unit.

    Raises:
        TargetError, NothingToCheck: as ``gradcheck``, and GC104 if no leaf matches.
        CannotDifferentiate: autograd cannot differentiate the backward.
    """
    start = time.perf_counter()
    names = {report_name(name) for name in leaf_names(subject, graph, wrt)}
    with preserve_generators(), ExitStack() as finally_:
        baseline = run_native(subject)
        finally_.callback(baseline.kept.put_back)
        source = oracle_runner(baseline.subject, baseline.input_mode, FunctionWatch())
        indices = [i for i, leaf in enumerate(source.runner.leaves) if {leaf.name, *leaf.tied} & names]
        probe = _Probe(source.runner, indices, torch.finfo(source.dtype).eps, subject.seed)
        found = probe.transposed() if graph == "jvp" else probe.along_gradient()
        findings = [_finding(graph, each) for each in found if each.verdict not in ("same", "unresolved")]
        if graph == "jvp":
            # Forward-mode AD, as jax.jvp and torch.func.jvp run it, uses the jvp that a custom Function defines.
            functions = FunctionCheck(source.runner, allows, probe.epsilon)
            functions.judge(is_alarmed=False)
            findings += [each for each in functions.findings((), is_explained=False) if each.code == "GC413"]
    return make_unit(
        subject.target,
        "eager",
        findings,
        [_row(graph, each) for each in found],
        allows=allows,
        fail_on=fail_on,
        seconds=time.perf_counter() - start,
    )


class CannotDifferentiate(Exception):
    """Autograd cannot differentiate the backward; its text is the reason, in a sentence."""


@dataclass(slots=True)
class _Probe:
    """A float64 runner of the model, and the leaves along which it moves."""

    runner: ModelRunner
    indices: Sequence[int]
    epsilon: float
    seed: int

    def transposed(self) -> list[_Agreement]:
        """Return for each output whether <w, J·v> is <Jᵀ·w, v> for random v and w."""
        generator = torch.Generator().manual_seed(self.seed)
        with twice_differentiable(), self.runner.instance.preserve_leaves():
            outputs = {name: t for name, t in self.runner.differentiate() if is_float(t) and t.requires_grad}
            by = self._by()
            worst: dict[str, _Agreement] = {}
            for _ in range(_PROBES):
                tangents = [gaussian_like(each, generator) for each in by]
                with self.runner.promoted(), _refusing():
                    found = jvp_of(list(outputs.values()), by, tangents)
                for (name, output), along in zip(outputs.items(), found, strict=True):
                    cotangent = gaussian_like(output, generator)
                    with self.runner.promoted():
                        vjp = torch.autograd.grad(output, by, cotangent, retain_graph=True, allow_unused=True)
                    given = [(g, v) for g, v in zip(vjp, tangents, strict=True) if g is not None]
                    error = abs(dot(cotangent, along) - sum(dot(g, v) for g, v in given))
                    scale = norm(cotangent) * norm(along) + sum(norm(g) * norm(v) for g, v in given)
                    tolerance = _EPSILONS * self.epsilon
                    agrees = error <= tolerance * scale
                    each = _Agreement(
                        name,
                        tuple(output.shape),
                        "same" if agrees else "wrong",
                        error / scale if scale else 0.0,
                        tolerance,
                    )
                    worst[name] = max(worst.get(name, each), each, key=lambda one: one.error)
        return list(worst.values())

    def along_gradient(self) -> list[_Agreement]:
        """Return for each leaf whether H·v is the derivative of its gradient along v, by finite differences."""
        generator = torch.Generator().manual_seed(self.seed)
        worst: dict[str, _Agreement] = {}
        with twice_differentiable(), self.runner.instance.preserve_leaves():
            self.runner.record()
            values = [self.runner.leaves[i].tensor.detach().clone() for i in self.indices]
            for _ in range(_PROBES):
                direction = [gaussian_like(each, generator) for each in values]
                length = math.sqrt(sum(norm(each) ** 2 for each in direction)) or 1.0
                direction = [each / length for each in direction]
                weights = [gaussian_like(each, generator) for each in values]
                (_, loss), *_ = self.runner.differentiate()
                with self.runner.promoted(), _refusing():
                    _, product = hvp_of(loss.sum(), self._by(), direction)
                projected = self._gradients(values, direction, weights)
                expected = [dot(w, p) for w, p in zip(weights, product, strict=True)]
                least = _LEAST_SHARE * max(map(abs, expected))
                for place, i in enumerate(self.indices):
                    name, scale = self.runner.leaves[i].name, max(abs(expected[place]), least)
                    phi = partial(_item, projected, place)
                    slope = slope_at_zero(phi, noise_floor(phi), scale, self.epsilon)
                    rounding = 64 * self.epsilon * float((weights[place] * product[place]).abs().sum())
                    verdict = _judge(slope, expected[place], scale, rounding)
                    each = _Agreement(name, tuple(values[place].shape), *verdict)
                    worst[name] = max(worst.get(name, each), each, key=_badness)
                self._place(values)
        return list(worst.values())

    def _by(self) -> list[Tensor]:
        return [self.runner.leaves[i].tensor for i in self.indices]

    def _place(self, values: Sequence[Tensor], direction: Sequence[Tensor] = (), t: float = 0.0) -> None:
        with torch.no_grad():
            for place, (tensor, value) in enumerate(zip(self._by(), values, strict=True)):
                tensor.copy_(value + t * direction[place] if direction else value)

    def _gradients(
        self, values: Sequence[Tensor], direction: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Callable[[float], list[float]]:
        """Return the function of t with <weights, gradient(values + t direction) - gradient(values)> for each leaf."""
        known: dict[float, list[float]] = {}
        base: list[Tensor] = []

        def gradients(t: float) -> list[Tensor]:
            self._place(values, direction, t)
            (_, loss), *_ = self.runner.beside()
            with self.runner.promoted():
                found = torch.autograd.grad(loss.sum(), self._by(), allow_unused=True)
            return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]

        def projected(t: float) -> list[float]:
            if not base:
                base.extend(gradients(0.0))
            if t not in known:
                known[t] = [math.nan] * len(values)
                with refusals_ignored():
                    known[t] = [dot(w, g - b) for w, g, b in zip(weights, gradients(t), base, strict=True)]
            return known[t]

        return projected


def _refusing() -> ExitStack:
    """Return a context that turns an error of autograd into CannotDifferentiate."""
    stack = ExitStack()

    def refuse(kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, RuntimeError | NotImplementedError):
            said = f"autograd cannot differentiate the backward of the model: {first_line(error)}"
            raise CannotDifferentiate(said.rstrip(".") + ".") from error
        return False

    stack.push(refuse)
    return stack


def _item(function: Callable[[float], list[float]], place: int, t: float) -> float:
    return function(t)[place]


def _judge(slope: Slope, expected: float, scale: float, rounding: float) -> tuple[TensorVerdict, float, float]:
    """Return the verdict on ``expected``, with its relative error and the tolerance of that."""
    scale = max(scale, abs(slope.derivative)) if math.isfinite(slope.derivative) else scale
    error = abs(slope.derivative - expected)
    allowed = 10 * slope.error + rounding
    relative = error / scale if scale else 0.0
    tolerance = allowed / scale if scale else 0.0
    if error <= allowed <= _APPROXIMATE * scale or error == scale == 0:
        return "same", relative, tolerance
    if slope.usable and error > allowed:
        return "wrong" if relative > _APPROXIMATE else "approximate", relative, tolerance
    return "unresolved", relative, tolerance


def _badness(each: _Agreement) -> tuple[bool, bool, float]:
    return each.verdict in ("wrong", "approximate"), each.verdict == "unresolved", each.error


def _row(graph: str, each: _Agreement) -> TensorResult:
    error = None if math.isnan(each.error) else number(each.error)
    return TensorResult(
        quantity="gradient",
        tensor=_tensor(graph, each),
        verdict="reference-wrong" if each.verdict == "wrong" else each.verdict,
        shape=each.shape,
        dtype="float64",
        error=error,
        budget=number(each.tolerance),
    )


def _tensor(graph: str, each: _Agreement) -> str:
    return f"jvp.{each.name}" if graph == "jvp" else each.name


def _finding(graph: str, each: _Agreement) -> Finding:
    wanted = (
        f"the JVP of {each.name} is not the transpose of its VJP"
        if graph == "jvp"
        else f"the HVP with respect to {each.name} is not the derivative of its gradient by finite differences"
    )
    is_wrong = each.verdict == "wrong"
    return Finding(
        code="GC426",
        severity="error" if is_wrong else "warning",
        quantity="gradient",
        tensor=_tensor(graph, each),
        verdict="reference-wrong" if is_wrong else each.verdict,
        message=f"{wanted}: relative error {each.error:.2e} (tolerance {each.tolerance:.2e}).",
        hint="a custom backward must be differentiable: ctx.saved_tensors, no detach, numpy or once_differentiable.",
        allow=f"GC426:{_tensor(graph, each)}",
    )
