"""Where in the user's program a gradient becomes wrong, or a value NaN: the call, its module, file and line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradctl.core.findings import Finding, Location
from gradctl.gradients.backward_localisation import find_wrong_parts
from gradctl.gradients.baseline import Baseline
from gradctl.gradients.functions.function_part import FunctionFault, function_name, source_place
from gradctl.gradients.gradient_findings import location
from gradctl.gradients.part import Vote, gaussian
from gradctl.numerics.runner import Outputs
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.tracing.graph import CallSite, leaves_behind, modules_by_identity
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.nonfinite import BackwardTrace, ForwardTrace, Made

_WRONG: dict[Vote, str] = {
    "vjp": "the backward (VJP) of {} is wrong, forward mode (JVP) agrees with finite differences",
    "both": "{} is wrong in reverse mode (VJP) and in forward mode (JVP)",
    None: "the backward of {} is wrong",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where something becomes wrong: what is said of it, the place, and the tensors that it spoils."""

    text: str
    location: Location | None
    tensors: frozenset[str]


def explain(finding: Finding, explanations: Iterable[Explanation]) -> Finding:
    """Return a finding about a tensor with where it becomes wrong; as it is where that is not known."""
    if finding.cause is not None:
        return finding
    about = [each for each in explanations if finding.tensor in each.tensors]
    if not about:
        return finding
    first, *others = about
    also = "".join(f"; {each.text} ({each.location})" for each in others)
    return msgspec.structs.replace(
        finding, message=f"{finding.message.removesuffix('.')}: {first.text}{also}.", location=first.location
    )


def explain_fault(fault: FunctionFault, tensors: Iterable[str]) -> Explanation:
    """Return the explanation of gradients that are wrong by no fault of the Function's own."""
    place = location(source_place(fault.function), op=function_name(fault.function))
    return Explanation(fault.message, place, frozenset(tensors))


def locate_wrong_backwards(
    runner: ModelRunner, settings: dict[str, Any], seconds: float = math.inf
) -> list[Explanation]:
    """Return the torch calls and leaf modules whose backward is wrong alone, at the present values of the leaves.

    Raises:
        TimeoutError: nothing was found in so many seconds.
    """
    deadline = time.perf_counter() + seconds
    explanations = []
    for part in find_wrong_parts(runner, settings, lambda: time.perf_counter() > deadline):
        text, names = _WRONG[part.vote].format(part.origin.op), leaves_behind(part.sources, runner.leaves)
        explanations.append(Explanation(text, _location(part.origin), frozenset(names)))
    return explanations


def locate_nonfinite_backwards(runner: ModelRunner, cotangents: dict[str, Tensor]) -> list[Explanation]:
    """Return the calls whose backward makes NaN or infinity of finite gradients, the first one first."""
    return _locate_nonfinite(runner.instance, runner.run, runner.promoted(), cotangents)


def locate_nonfinite_natively(subject: Subject, native: Baseline) -> list[Explanation]:
    """Return the same for the model in its own dtype."""
    instance = Instance(subject, input_mode=native.input_mode)
    cotangents = dict(zip(native.outputs, gaussian(list(native.outputs.values()), subject.seed), strict=True))
    return _locate_nonfinite(instance, instance.run, nullcontext(), cotangents)


def _locate_nonfinite(
    instance: Instance,
    run: Callable[[BackwardTrace], Outputs],
    context: AbstractContextManager[None],
    cotangents: dict[str, Tensor],
) -> list[Explanation]:
    trace = BackwardTrace(modules_by_identity(instance.model))
    with instance.preserve_leaves():
        with torch.enable_grad():
            outputs = {name: t for name, t in run(trace) if name in cotangents and t.requires_grad}
        with trace.watching(list(outputs.values())), context:
            torch.autograd.backward(list(outputs.values()), [cotangents[name].clone() for name in outputs])
    for leaf in instance.leaves:
        leaf.take_gradient()
    seen: frozenset[str] = frozenset()
    explanations = []
    for maker in trace.makers:  # each for the leaves whose gradient was still finite before
        reached = leaves_behind([maker.node], instance.leaves) - seen
        seen |= reached
        function = getattr(maker.node, "_forward_cls", None)
        name = function_name(function) if function is not None else maker.origin.op
        place = location(source_place(function), op=name) if function is not None else _location(maker.origin)
        explanations.append(Explanation(f"the backward of {name} makes the first", place, frozenset(reached)))
    return explanations


def locate_nonfinite_outputs(findings: Sequence[Finding], subject: Subject, native: Baseline) -> list[Finding]:
    """Return findings about the native run, an output that is NaN with the call that made the first one."""
    names = {finding.tensor for finding in findings if finding.code == "GC407"}
    if not names:
        return list(findings)
    instance = Instance(subject, input_mode=native.input_mode)
    trace = ForwardTrace(modules_by_identity(instance.model))
    with instance.preserve_leaves(), torch.enable_grad():
        made = {name: trace.of(t) for name, t in instance.run(trace) if name in names}
    places = [
        Explanation(_made_in_words(origin), _location(origin.first), frozenset({name}))
        for name, origin in made.items()
        if origin is not None
    ]
    return [explain(finding, places) for finding in findings]


def _made_in_words(made: Made) -> str:
    if made.first == made.nan:
        return f"{made.first.op} makes the first"
    return f"{made.first.op} makes the first infinity, {made.nan.op} NaN of it ({_location(made.nan)})"


def _location(origin: CallSite) -> Location | None:
    return location(origin.place, op=origin.op, module=origin.module or None)
