"""Custom Functions as culprits: which of them fail alone, and what is wrong in the model besides them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gradctl.checks.allows import Allows
from gradctl.checks.functions import FunctionFault, broken_contracts, first_order_fault, function_name
from gradctl.checks.gradient_findings import contract_finding, function_finding
from gradctl.core.errors import NothingToCheck
from gradctl.core.findings import Finding
from gradctl.numerics.functions import FunctionCall, FunctionClass, is_torch_own
from gradctl.numerics.judge import Judge, TensorJudgement
from gradctl.numerics.point import NoGradient
from gradctl.numerics.runner import ModelRunner

__all__ = ["Blame", "blame_functions", "contract_findings", "is_allowed", "tensors_behind"]

_CALLS_PER_CLASS = 16


@dataclass(slots=True)
class Blame:
    """Functions that fail alone, the module that applies each, and what is wrong even with those taken as stated."""

    faults: dict[FunctionClass, FunctionFault] = field(default_factory=dict)
    modules: dict[FunctionClass, str | None] = field(default_factory=dict)
    own: dict[int, TensorJudgement] = field(default_factory=dict)
    forwards: int = 0


def blame_functions(judge: Judge, runner: ModelRunner, wrong: Sequence[int], settings: dict[str, Any]) -> Blame:
    """Return which custom Functions are not the derivative at the inputs they get here, each checked alone.

    Those are then replaced by the linear map their backward states and the ``wrong`` tensors judged again: what agrees
    now was only behind them. Leaves the runner recorded as it was.
    """
    watch = runner.watch
    allowed, before, unjudged = watch.linearised, watch.calls_per_class, set(watch.unjudged)
    watch.calls_per_class = _CALLS_PER_CLASS
    judge.origin.record()
    calls, blame = list(watch.calls), Blame()
    watch.calls_per_class = before
    for call in calls:
        if call.function not in blame.faults and not allowed(call.function):
            fault = first_order_fault(call, runner, runner.instance.subject.seed)
            if fault is not None:
                blame.faults[call.function], blame.modules[call.function] = fault, call.module
    if blame.faults:
        watch.linearised = lambda function: function in blame.faults or allowed(function)
        try:
            around = Judge(runner, **settings)
            suspects, _ = around.screen(wrong)
            judged, _ = around.each(suspects)
            blame.own = {i: each for i, each in judged.items() if each.verdict in ("wrong", "missing")}
            blame.forwards = around.point.forwards
        except NoGradient:  # every output is behind a Function that states no linear map: nothing is left to judge
            blame.own = {}
        finally:
            watch.linearised, watch.unjudged = allowed, unjudged
    judge.point.record()
    return blame


def contract_findings(
    calls: Sequence[FunctionCall], runner: ModelRunner, faulty: dict[FunctionClass, FunctionFault], allows: Allows
) -> list[Finding]:
    """Return findings about what other callers may ask of the Functions used here, and about those that are allowed."""
    subject, findings = runner.instance.subject, []
    for call in calls:
        if call.function in faulty or is_torch_own(call.function):
            continue
        fault = first_order_fault(call, runner, subject.seed) if is_allowed(call.function, allows) else None
        if fault is not None:
            findings.append(function_finding(fault, call.module))
            continue
        for broken in broken_contracts(call, runner, subject.seed):
            findings.append(contract_finding(broken, call.module, is_target=call.function is subject.function))
    return findings


def is_allowed(function: FunctionClass, allows: Allows) -> bool:
    """Tell whether the user accepts that this Function's backward is not its derivative."""
    return bool(allows.matching(f"GC408:{function_name(function)}"))


def nothing_in_front(target: str, functions: Iterable[FunctionClass]) -> NothingToCheck:
    """Return GC110 for a model all of whose outputs come through allowed Functions that state no linear map."""
    names = ", ".join(sorted(function_name(function) for function in functions))
    return NothingToCheck(
        "GC110",
        f"every output of {target} is behind {names}, which is allowed and cannot be judged around: its backward is "
        "once_differentiable or not linear in its cotangent. Make it a torch program, or check what comes before it.",
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
