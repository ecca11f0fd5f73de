"""Causes of a difference: rule codes GC2xx, as ``cause`` of a finding, each established by an experiment.

Eager runs once more with an intervention: a custom backward is replaced by the derivative of its forward, a hook or a
cut is left out, the model is in its other mode, or Python queries have the results that they had on the example. If
eager then computes the very tensor that the form computed, and still agrees with the form where they agreed before, the
intervention is the cause. Without such an intervention there is no cause; none is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key, ModelDifference, tensor_difference
from gradctl.comparison.form_comparison import FormComparison
from gradctl.comparison.program import run_calls
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.core.findings import Finding
from gradctl.forms import eager
from gradctl.forms.form import Outcome
from gradctl.gradients.gradient_findings import location
from gradctl.numerics.agreement import largest_scale
from gradctl.subject.frames import first_line
from gradctl.subject.instance import Instance
from gradctl.subject.state import State
from gradctl.tracing.tracer import SourceLine

# The key of an error that a form raises, among those of the tensors that differ.
RAISES: Key = ("output", "")
# An intervention must reduce the error by this factor, since rounding may explain nearly all of a small difference.
_NEARER = 10.0
_Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Cause:
    """The reason for a difference.

    Attributes:
        code: GC2xx.
        words: the clause after "because".
        hint: the remedy.
        place: file and line in the user's program.
        module: path of the module, if it is a module.
    """

    code: str
    words: str
    hint: str
    place: SourceLine | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Intervention:
    """Eager, changed in the way in which a form may have changed it.

    Attributes:
        cause: the cause, if the form computes the same.
        context: entered around each call and its backward.
        before: changes a private copy before each call of its model.
        call: from a private copy to the callable that replaces its model.
        keep_hooks: whether hooks on modules and parameters are kept.
        alone: the same for each place alone, if there are several.
    """

    cause: Cause
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    before: Callable[[Instance], None] = lambda instance: None
    call: Callable[[Instance], _Call] = lambda instance: instance.model
    keep_hooks: bool = True
    alone: tuple[Intervention, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """Compares eager under interventions with the outcomes of a form."""

    comparison: FormComparison

    @property
    def reference(self) -> Reference:
        """Eager on all inputs."""
        return self.comparison.reference

    def open(self) -> set[Key]:
        """Return the tensors on which the form differs."""
        wrong = {key for key, each in self.comparison.worst.items() if each.differs}
        return wrong | {RAISES} if self.comparison.raised else wrong

    def causes(self, alterations: Iterable[Intervention], found: dict[Key, Cause]) -> None:
        """Note in ``found`` the first alteration that explains each tensor that has no cause yet."""
        for altered in alterations:
            left = self.open() - found.keys()
            if not left:
                return
            explained = self.explained(altered, left)
            if explained:
                found.update(dict.fromkeys(explained, self._narrowed(altered, explained)))

    def explained(self, altered: Intervention, keys: set[Key]) -> set[Key]:
        """Return those of ``keys`` on which eager with this intervention agrees with the form."""
        found = {RAISES} if RAISES in keys and self._raises(altered) else set()
        for trial in self.reference.trials:
            if self.worst_on(trial).keys() & keys:
                found |= self._explained_on(trial, altered) & keys
        return found

    def worst_on(self, trial: ModelTrial) -> dict[Key, ModelDifference]:
        """Return the tensors whose largest difference is on this trial."""
        return {key: each for key, each in self.comparison.worst.items() if each.trial is trial}

    def _narrowed(self, altered: Intervention, explained: set[Key]) -> Cause:
        """Return the cause with the one place that explains all, if one does."""
        for alone in altered.alone:
            if self.explained(alone, explained) == explained:
                return alone.cause
        return altered.cause

    def _explained_on(self, trial: ModelTrial, altered: Intervention) -> set[Key]:
        here = self.worst_on(trial)
        calls = max(each.call for each in here.values())
        native = self._run(trial, altered, calls)
        if native[-1].error is not None:
            return set()
        runs = list(zip(native, self._oracle(trial, altered, native), strict=True))
        as_form = {key for key, each in here.items() if _computes_the_same(key, each, *runs[each.call - 1])}
        # Tensors that agree must still agree: otherwise eager is another program, which coincides by chance.
        are_kept = all(key in as_form or each.differs or each.exceeds for key, each in here.items())
        return as_form if are_kept else set()

    def _oracle(self, trial: ModelTrial, altered: Intervention, native: list[Outcome]) -> list[Outcome]:
        """Return the same calls in float64; the native calls if altered eager does not run in float64."""
        if trial.float64 is None:
            return native
        float64 = self._run(trial, altered, len(native), promoted=True)
        return native if float64[-1].error is not None else float64

    def _raises(self, altered: Intervention) -> bool:
        """Return whether altered eager raises the error of the form on each trial on which the form raises."""
        trials = [trial for trial in self.reference.trials if trial.name in self.comparison.raised]
        for trial in trials:
            error = self._run(trial, altered, len(trial.native))[-1].error
            if error is None or first_line(error) != first_line(self.comparison.raised[trial.name]):
                return False
        return bool(trials)

    def _run(self, trial: ModelTrial, altered: Intervention, calls: int, *, promoted: bool = False) -> list[Outcome]:
        instance = Instance(
            trial.instance.subject,
            promoted=promoted,
            input_mode=self.reference.input_mode,
            keep_hooks=altered.keep_hooks,
        )
        model = altered.call(instance)

        def call(*args: Any, **kwargs: Any) -> Any:
            altered.before(instance)
            return model(*args, **kwargs)

        captured = replace(eager.capture(instance), call=call)

        def context() -> AbstractContextManager[Any]:
            stack = ExitStack()
            if promoted:
                stack.enter_context(self.reference.promoting())
            stack.enter_context(altered.context())
            return stack

        differentiable = trial.native[0].differentiable
        return run_calls(captured, instance, State([]), differentiable=differentiable, calls=calls, context=context)


def state_causes(findings: Sequence[Finding], causes: dict[Key, Cause]) -> list[Finding]:
    """Return the findings with their causes, in code, in words and with the place."""
    return [_with_cause(each, causes.get(key_of(each))) for each in findings]


def key_of(finding: Finding) -> Key:
    """Return the quantity and tensor of a finding; ``RAISES`` if it is not about a tensor."""
    return (finding.quantity, finding.tensor) if finding.quantity and finding.tensor else RAISES


def _with_cause(finding: Finding, cause: Cause | None) -> Finding:
    if cause is None or finding.severity != "error":
        return finding
    place = location(cause.place, module=cause.module)
    where = f", at {place.file}:{place.line}" if place is not None and place.file else ""
    return msgspec.structs.replace(
        finding,
        cause=cause.code,
        cause_message=f"{cause.words}{where}.",
        message=f"{finding.message} This is because {cause.words} ({cause.code}){where}.",
        hint=finding.hint or cause.hint,
        location=finding.location or place,
    )


def _computes_the_same(key: Key, each: ModelDifference, native: Outcome, float64: Outcome) -> bool:
    """Return whether an outcome of altered eager has the tensor that the form computed."""
    quantity, name = key
    oracles = tensors_of(float64, quantity)
    altered, candidate = tensors_of(native, quantity).get(name), each.candidate
    if altered is None or candidate is None:
        return altered is candidate
    is_other = (altered.shape, altered.dtype) != (candidate.shape, candidate.dtype)
    if is_other or each.requires_grad not in (None, name in native.differentiable) or _differs_in_float64_only(each):
        return False
    neighbours = largest_scale(oracles.values())
    found = tensor_difference(
        name, altered, candidate, oracle=oracles.get(name), neighbours=neighbours, trial=each.trial
    )
    return not found.exceeds and (not (each.differs and each.exceeds) or _NEARER * found.error <= each.error)


def _differs_in_float64_only(each: ModelDifference) -> bool:
    """Return whether the native tensors are too similar to distinguish the form from eager."""
    return each.differs and not (each.exceeds or each.structure or each.requires_grad is not None)
