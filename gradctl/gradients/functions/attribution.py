"""Custom Functions that are at fault: which are not the derivative, and what is wrong in the model besides them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gradctl.core.allows import Allows
from gradctl.core.errors import NothingToCheck, listed
from gradctl.core.findings import Finding
from gradctl.gradients.functions.applications import Judged, judge_applications
from gradctl.gradients.functions.function_contracts import contract_faults, first_order_fault, kink_fault
from gradctl.gradients.functions.function_part import FunctionFault, fault_size, function_name
from gradctl.gradients.functions.survey import COTANGENTS, Application, choose_sample, survey
from gradctl.gradients.gradient_findings import function_finding, latent_finding
from gradctl.gradients.guard import explaining
from gradctl.numerics.judge import Judge, TensorJudgement
from gradctl.numerics.point import NoGradient
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.tracer import FunctionClass

# So many groups of calls of one Function (shapes, dtypes, inputs that require a gradient) are also judged alone.
_GROUPS = 3


@dataclass(slots=True)
class FunctionCheck:
    """The custom Functions of one model, judged where it applies them and alone."""

    runner: ModelRunner  # its leaves at the point
    allows: Allows
    epsilon: float  # machine epsilon of the dtype in which the model is run
    # Functions that are not the derivative along a direction in which this model moves their inputs.
    faults: dict[FunctionClass, FunctionFault] = field(default_factory=dict)
    # Functions that are right, but for what the model changes between their forward and their backward.
    stale: dict[FunctionClass, FunctionFault] = field(default_factory=dict)
    _exercised: list[FunctionFault] = field(default_factory=list)
    _applications: list[Application] = field(default_factory=list)
    _judged: list[Judged] = field(default_factory=list)
    _faulty: dict[FunctionClass, Application] = field(default_factory=dict)

    def judge(self, *, is_alarmed: bool, tolerated: float = 0.0) -> None:
        """Judge a sample of the applications of each Function; all, and then in place, on an alarm that has no fault.

        A fault whose relative error is ``tolerated`` is dropped. Leaves the runner recorded at another point.
        """
        self._applications = survey(self.runner)
        sample = choose_sample(self._applications, self._seed)
        self._judge(sample)
        if is_alarmed and not self.faults:
            numbers = {application.number for application in sample}
            self._judge([each for each in self._applications if each.number not in numbers])
        if is_alarmed and not self.faults:
            self._judge_in_place()
        self.faults = {f: each for f, each in self.faults.items() if not 0 <= fault_size(each) <= tolerated}

    def _judge(self, applications: Sequence[Application]) -> None:
        judged = judge_applications(self.runner, applications, self._seed, self.epsilon)
        self._judged += judged
        for each in judged:
            function = each.application.function
            if function in self.faults or not each.application.is_used or self._is_allowed(function):
                continue
            fault = None
            if each.verdict in ("wrong", "unresolved"):
                with explaining(f"what {function_name(function)} does alone"):
                    fault = first_order_fault(each.call, self.runner, self._seed)
            if fault is None and each.verdict == "wrong":
                said = "is not the derivative along the directions in which the model moves its inputs"
                fault = _fault(each, "first", f"{said}: off by {each.error:.2e} (relative)")
            if fault is not None:
                self.faults[function], self._faulty[function] = fault, each.application

    def _judge_in_place(self) -> None:
        """Judge the Functions that are right on copies with the memory and in the state that the model hands them."""
        outside = [each for each in self._applications if each.is_used and not each.inside]
        candidates = [each for each in outside if not self._is_allowed(each.function)]
        for each in judge_applications(self.runner, candidates, self._seed, self.epsilon, in_place=True):
            function = each.application.function
            if each.verdict != "wrong" or function in self.faults:
                continue
            if each.memory:
                said = f"is not the derivative where {' and '.join(dict.fromkeys(each.memory))}"
                self.faults[function] = _fault(each, "memory", f"{said}; on contiguous copies it is")
                self._faulty[function] = each.application
            else:
                said = "reads values that are changed after its forward; on copies of its inputs it is right"
                self.stale.setdefault(function, _fault(each, "state", said))

    def findings(self, hidden_from: Collection[str], *, is_explained: bool) -> list[Finding]:
        """Return one finding for each faulty Function, and what the others do wrong for another model.

        ``hidden_from`` names the leaves whose gradient is right, if none is wrong; ``is_explained``: each wrong tensor
        lies behind a faulty Function.
        """
        found = []
        hidden = self._behind({each.number for each in self._faulty.values()}) if hidden_from and self._faulty else {}
        for function, fault in self.faults.items():
            names = sorted(set().union(*hidden.get(self._faulty[function].number, {}).values()) & set(hidden_from))
            if names:
                said = f"{fault.message}; no gradient shows it at this point, but those of {listed(names, 4)} pass it"
                fault = replace(fault, message=said)  # noqa: PLW2901  # the same, with more said
            found.append(function_finding(fault, self._faulty[function].module))
        return [*found, *self._latent(is_explained=is_explained)]

    def _latent(self, *, is_explained: bool) -> Iterator[Finding]:
        """Yield what is wrong with Functions whose gradient in this model is right, or is accepted as it is."""
        said = set()
        for judged in self._each_group():
            function, module = judged.application.function, judged.application.module
            faults: list[FunctionFault] = []
            with explaining(f"what {function_name(function)} does alone"):
                faults = self._faults_alone(judged)
            for fault in faults:
                if (function, fault.rule, fault.caller) in said:
                    continue
                said.add((function, fault.rule, fault.caller))
                is_exercised = self._is_exercised(fault, is_explained=is_explained)
                self._exercised += [fault] if is_exercised else []
                is_serious = is_exercised or self._is_allowed(function)
                yield function_finding(fault, module) if is_serious else latent_finding(fault, module)

    def _faults_alone(self, judged: Judged) -> list[FunctionFault]:
        fault = first_order_fault(judged.call, self.runner, self._seed)
        if fault is not None:
            return [replace(fault, caller=fault.caller or "elsewhere")]
        if judged.kinked and (fault := kink_fault(judged.call, self.runner)) is not None:
            return [replace(fault, caller="kink")]
        return self._with_one_frozen(contract_faults(judged.call, self.runner, self._seed))

    def _with_one_frozen(self, faults: list[FunctionFault]) -> list[FunctionFault]:
        """Return the faults, of those about frozen inputs one: one that matters here, if there is any."""
        frozen = [fault for fault in faults if fault.caller == "frozen"]
        if len(frozen) < 2:
            return faults
        kept = next((fault for fault in frozen if self._is_exercised(fault)), frozen[0])
        return [fault for fault in faults if fault.caller != "frozen" or fault is kept]

    def _each_group(self) -> list[Judged]:
        """Return one application, at a kink if one is, of the first groups of each Function that has no fault."""
        chosen: dict[FunctionClass, dict[Any, Judged]] = {}
        for judged in sorted(self._judged, key=lambda each: (not each.kinked, each.application.number)):
            if judged.application.function not in self.faults:
                groups = chosen.setdefault(judged.application.function, {})
                if len(groups) < _GROUPS:
                    groups.setdefault(judged.application.group, judged)
        return [judged for groups in chosen.values() for judged in groups.values()]

    def _is_exercised(self, fault: FunctionFault, *, is_explained: bool = True) -> bool:
        """Tell whether this model's training uses what a Function does wrong."""
        if fault.caller is None or fault.function is self.runner.instance.subject.function:
            return True
        applications = self._applied(fault)
        # What arrives in a transform of torch.func is not seen.
        unseen = {"layout"} | ({"second"} if any(each.inside for each in applications) else set())
        if not is_explained and fault.rule in unseen:
            return True
        if fault.caller == "frozen":  # in training a model's inputs require no gradient, nor does what is made of them
            return self._is_frozen(fault.position, {each.number for each in applications})
        return any(fault.caller in each.uses for each in applications)

    def _is_frozen(self, position: int | None, numbers: Collection[int]) -> bool:
        """Tell whether an argument of an application is made of the model's inputs alone."""
        names = [leaves.get(position, set()) for leaves in self._behind(numbers).values() if position is not None]
        return any(each and all(name.startswith("input:") for name in each) for each in names)

    def presumed_causes(self) -> list[FunctionFault]:
        """Return what no linear map can show: a double backward, and what depends on memory or on a transform."""
        faults = [each for each in self.faults.values() if not self.is_linear(each)]
        return faults + [each for each in self._exercised if each.rule in ("second", "layout")]

    def is_linear(self, fault: FunctionFault) -> bool:
        """Tell whether a linear map can replace a faulty Function, to judge what is wrong besides."""
        return fault.rule != "memory" and not any(each.inside for each in self._applied(fault))

    def names_behind(self, fault: FunctionFault) -> set[str]:
        """Return the names of the leaves whose gradient passes what is faulty."""
        is_second = fault.rule == "second"
        numbers = {each.number for each in self._applied(fault) if each.is_differentiated_twice or not is_second}
        found = (leaves.items() for leaves in self._behind(numbers).values())
        return {name for items in found for k, names in items if is_second or k != COTANGENTS for name in names}

    def _applied(self, fault: FunctionFault) -> list[Application]:
        return [each for each in self._applications if each.function is fault.function]

    def _behind(self, numbers: Collection[int]) -> dict[int, dict[int, set[str]]]:
        """Return the names of the leaves behind each argument of these applications."""
        return {each.number: each.leaves for each in survey(self.runner, numbers) if each.number in numbers}

    def _is_allowed(self, function: FunctionClass) -> bool:
        return is_allowed(function, self.allows)

    @property
    def _seed(self) -> int:
        return self.runner.instance.subject.seed

    # ------------------------------------------------------------------ what is wrong besides

    def judge_besides(self, wrong: Sequence[int], settings: dict[str, Any]) -> tuple[dict[int, TensorJudgement], int]:
        """Return what is wrong even with the faulty Functions as the linear maps that they state, and the forwards."""
        watch = self.runner.watch
        allowed, unjudged = watch.linearised, set(watch.unjudged)
        watch.linearised = lambda function: function in self.faults or allowed(function)
        try:
            around = Judge(self.runner, **settings)
            return around.wrong(wrong, is_settled=True), around.forwards
        except NoGradient:  # every output is behind a Function that states no linear map: nothing is left to judge
            return {}, 0
        finally:
            watch.linearised, watch.unjudged = allowed, unjudged


def _fault(judged: Judged, rule: str, said: str) -> FunctionFault:
    """Return the fault of a Function that is not the derivative where the model applies it."""
    function = judged.application.function
    return FunctionFault(function, rule, f"{function_name(function)}.backward {said}", judged.error)


def is_allowed(function: FunctionClass, allows: Allows) -> bool:
    """Tell whether the user accepts that this Function's backward is not its derivative."""
    return bool(allows.matching(f"GC408:{function_name(function)}"))


def nothing_in_front(target: str, functions: Iterable[FunctionClass]) -> NothingToCheck:
    """Return GC110 for a model all of whose outputs come through allowed Functions that state no linear map."""
    names = ", ".join(sorted(function_name(function) for function in functions))
    return NothingToCheck(
        "GC110",
        f"every output of {target} is behind {names}, which is accepted and cannot be excluded: its backward is "
        "once_differentiable or not linear in the incoming gradient. Write it with torch operations, or check the part "
        "of the model before it.",
    )


def tensors_behind(judge: Judge, runner: ModelRunner) -> set[int]:
    """Return the tensors whose gradient passes a Function that was cut because its backward states no linear map."""
    watch = runner.watch
    if not watch.unjudged:
        return set()
    cut, functions = judge.samples[0], watch.unjudged
    watch.unjudged = set()
    try:
        whole = judge.point.gradients(cut.cotangents, judge.generator)
    finally:
        watch.unjudged = functions
    return {
        i
        for i, (with_it, without) in enumerate(zip(whole, cut.gradients, strict=True))
        if with_it is not None and (without is None or not torch.equal(with_it, without))
    }
