"""Who is right where a form's gradient differs from eager's: finite differences along the difference.

Four forwards a step, no loss by the size of the tensor: along the unit vector of g_form - g_eager the two
predictions lie their whole distance apart, and the slope lies on one of them, or on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gradctl.comparison.difference import ModelDifference
from gradctl.comparison.program import cotangents_of
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.core.allows import Allows
from gradctl.core.findings import Element, StepLadder
from gradctl.core.names import TensorVerdict
from gradctl.core.numbers import number
from gradctl.gradients.float64 import oracle_runner
from gradctl.gradients.functions.attribution import is_allowed
from gradctl.numerics.elements import component_of, components_of, element_slope, index_of
from gradctl.numerics.ladder import noise_floor, slope_at_zero, step_ladder
from gradctl.numerics.measures import dot, norm
from gradctl.numerics.point import Point, Sample
from gradctl.tracing.functions import FunctionWatch
from gradctl.tracing.model_runner import ModelRunner

_ROWS = 5
# The slope must be nearer than this (of the distance of the two) to one of them to side with it.
_SIDES = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """Eager in float64 on the inputs of one trial, with the cotangents that every form got there."""

    runner: ModelRunner
    point: Point
    sample: Sample


@dataclass(slots=True)
class Arbiter:
    """Finite differences of eager, made when first asked for.

    Args:
        reference: eager on all inputs.
        allows: accepted Functions are judged around, as in gradcheck.
    """

    reference: Reference
    allows: Allows
    ladders: dict[str, StepLadder | None] = field(default_factory=dict)  # by gradient, until they are taken
    _benches: dict[str, _Bench | None] = field(default_factory=dict)

    def verdict(self, difference: ModelDifference) -> TensorVerdict:
        """Return ``wrong`` where eager is right, ``reference-wrong`` where the form is, else ``differs``."""
        bench = self._bench(difference.trial) if difference.call == 1 else None
        if bench is None or bench.runner.recording.hooks or bench.runner.instance.disabled_hooks:
            return "differs"  # a hook changes the gradient on purpose: finite differences know nothing of it
        i = self._index(bench, difference.name)
        eager, form = (self._as_leaf(bench, i, gradient) for gradient in difference.judged)
        distance = norm(form - eager)
        if not distance or not bool(torch.isfinite(form - eager).all()):
            return "differs"
        along = (form - eager) / distance
        phi = bench.point.along(bench.point.along_leaf(i, along), bench.sample)
        slope = slope_at_zero(phi, noise_floor(phi), distance)
        stated = dot(eager, along)
        self.ladders[difference.name] = step_ladder(slope, stated, stated + distance)
        if not slope.error < _SIDES * distance:
            return "differs"
        place = (slope.derivative - stated) / distance  # 0: eager is right, 1: the form is
        if abs(place) < _SIDES:
            return "wrong"
        return "reference-wrong" if abs(place - 1) < _SIDES else "differs"

    def rows(self, difference: ModelDifference) -> tuple[tuple[Element, ...], int]:
        """Return the worst elements with finite differences, worst first, and how many elements differ."""
        bench = self._bench(difference.trial)
        reference, candidate = difference.judged
        like = reference if reference is not None else candidate
        assert like is not None
        eager = torch.zeros_like(like) if reference is None else reference
        form = torch.zeros_like(like) if candidate is None else candidate
        is_known = bench is not None and any(leaf.name == difference.name for leaf in bench.runner.leaves)
        if bench is None or not is_known or eager.shape != form.shape:  # unknown: a leaf of the candidate alone
            return (), 0
        i = self._index(bench, difference.name)
        gap = (form.double() - eager.double() if not form.is_complex() else form - eager).abs().reshape(-1)
        beyond = max(difference.budget, 1e-6) * max(float(eager.abs().max()), float(form.abs().max()))
        count = int((gap > beyond).sum())
        worst = gap.argsort(descending=True)[: min(_ROWS, count)].tolist()
        slope_of = partial(element_slope, bench.point, bench.sample, i)
        return tuple(row for position in worst for row in _element_rows(eager, form, position, slope_of)), count

    def _bench(self, trial: ModelTrial) -> _Bench | None:
        if trial.name not in self._benches:
            self._benches[trial.name] = self._made(trial)
        return self._benches[trial.name]

    def _made(self, trial: ModelTrial) -> _Bench | None:
        watch = FunctionWatch(linearised=lambda function: is_allowed(function, self.allows))
        source = oracle_runner(trial.instance.subject, self.reference.input_mode, watch)
        if source.dtype != torch.float64:
            return None
        point = Point(source.runner)
        if not point.consistent or watch.unjudged:
            return None
        return _Bench(source.runner, point, _sample(point, trial))

    def _index(self, bench: _Bench, leaf_name: str) -> int:
        return next(i for i, leaf in enumerate(bench.runner.leaves) if leaf.name == leaf_name)

    def _as_leaf(self, bench: _Bench, i: int, gradient: Tensor | None) -> Tensor:
        value = bench.point.values[i]
        return torch.zeros_like(value) if gradient is None else gradient.to(value.dtype)


def _sample(point: Point, trial: ModelTrial) -> Sample:
    """Return the cotangents that every form got on a trial, zero where an output is not finite."""
    cotangents = cotangents_of(dict(point.outputs), trial.instance.subject.seed)
    asked = {name: w for name, w in cotangents.items() if name in trial.native[0].differentiable}
    finite = {name: torch.isfinite(value) for name, value in point.outputs if name in asked}
    partly = {name: mask for name, mask in finite.items() if not bool(mask.all())}
    masked = {name: torch.where(partly[name], w, 0) if name in partly else w for name, w in asked.items()}
    return Sample(masked, partly, [], [], {})


def _element_rows(eager: Tensor, form: Tensor, position: int, slope_of: Callable[..., float]) -> Iterator[Element]:
    """Yield the row of each component of one element; the position is that in the flat tensor."""
    for component in components_of(eager):
        own, other = (component_of(each.reshape(-1)[position], component) for each in (eager, form))
        slope = slope_of(position, component)
        yield Element(
            index=index_of(position, eager),
            component=component,
            reference=number(own),
            candidate=number(other),
            finite_difference=number(slope),
            absolute_error=number(abs(other - slope)),
            relative_error=number(abs(other - slope) / abs(slope) if slope else float("inf")),
        )
