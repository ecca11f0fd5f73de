"""From judgements about gradients to findings and tensor results: the words of GC401 to GC414."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradctl.core.findings import Element, Finding, Location, TensorResult, number
from gradctl.core.names import Severity, TensorVerdict, parameter_name
from gradctl.gradients.baseline import Baseline
from gradctl.gradients.function_contracts import FunctionFault, function_name, source_place
from gradctl.gradients.guard import explaining
from gradctl.numerics.elements import ElementDifference
from gradctl.numerics.judge import TensorJudgement
from gradctl.subject.instance import Leaf
from gradctl.subject.signature import module_of, optimized_inner
from gradctl.subject.subject import Subject
from gradctl.tracing.graph import leaves_behind
from gradctl.tracing.recording import Recording
from gradctl.tracing.tracer import SourceLine

__all__ = [
    "constant_inputs_note",
    "cut_notes",
    "frozen_results",
    "function_finding",
    "gradient_finding",
    "hook_notes",
    "kink_note",
    "latent_finding",
    "listed",
    "location",
    "native_gradient_findings",
    "not_replayed",
    "of_form",
    "tensor_result",
    "too_large_notes",
    "undifferentiated_note",
    "with_hooks",
]

_CONSTANT_ROUNDING = 1e-7

_RULES: dict[str, tuple[str, str]] = {
    "first": ("GC408", "a straight-through or reversed gradient is meant to differ: then accept it"),
    "linear": ("GC408", "a clipped or quantised gradient is meant: then accept it"),
    "layout": (
        "GC408",
        "read the cotangent through torch calls, not by its memory, never write to it, and take None for one that is "
        "not there",
    ),
    "forward-mode": ("GC413", "make jvp the derivative of forward"),
    "second": ("GC414", "mark backward @once_differentiable, or save inputs and outputs with ctx.save_for_backward"),
}


def function_finding(fault: FunctionFault, module: str | None, *, severity: Severity = "error") -> Finding:
    """Return the headline for a custom Function that breaks a rule; ``module`` is the path of one that applies it."""
    code, hint = _RULES[fault.rule]
    name = function_name(fault.function)
    place = None
    with explaining(f"where {name} is written"):
        place = source_place(fault.function)
    return Finding(
        code=code,
        severity=severity,
        quantity="gradient",
        message=f"{fault.message}.",
        hint=hint,
        error=number(fault.error),
        allow=f"{code}:{name}",
        location=location(place, op=name, module=module or None),
    )


def latent_finding(fault: FunctionFault, module: str | None) -> Finding:
    """Return the finding for what a Function does wrong if it is asked for something that this model does not ask.

    A warning; a note if it is asked for a second derivative, which most Functions do not claim to have.
    """
    if fault.caller == "kink":  # at this very point; but any value there may be what its author wants
        return function_finding(fault, module, severity="warning")
    if fault.caller == "second-order":
        return function_finding(fault, module, severity="note")
    elsewhere = fault.caller == "elsewhere"
    why = (
        "this model moves its inputs along directions in which it is right"
        if elsewhere
        else "this model does not do that"
    )
    return function_finding(replace(fault, message=f"latent: {fault.message}; {why}"), module, severity="warning")


def gradient_finding(
    leaf: Leaf,
    judged: TensorJudgement,
    cause: type | None,
    broken: Tensor | None,
    *,
    is_output_broken: bool = False,
) -> Finding | None:
    """Return the finding about one leaf's gradient, or None if there is nothing to say.

    Args:
        leaf: the leaf.
        judged: the verdict on its gradient.
        cause: a custom Function that it is wrong for.
        broken: the gradient's elements that are NaN or infinite, as a mask; None if there is none.
        is_output_broken: whether an output is NaN, which then is the cause of a broken gradient.
    """
    module = leaf.name.partition(":")[2].rpartition(".")[0] or None
    place = Location(module=module) if leaf.name.startswith("param:") and module else None
    by = f" (relative error {judged.error:.2e})" if judged.error is not None else ""
    code, severity, verdict, message, hint = "GC401", "error", "reference-wrong", "", ""
    if broken is not None:
        code = "GC407"
        message = f"the gradient of {leaf.name} is NaN or infinite in {int(broken.sum())} of {broken.numel()} elements."
        hint = "a branch not taken still passes NaN (where with sqrt or log): make its argument safe before the where."
        hint = "an output is NaN, and this with it: begin there." if is_output_broken else hint
    elif judged.verdict == "missing":
        code, verdict = "GC403", "missing"
        message = f"autograd gives {leaf.name} no gradient, but the output changes with it."
        hint = "look for a custom backward that returns None, or a tensor rebuilt outside autograd (numpy, new_tensor)."
    elif judged.verdict == "approximate":
        # A constant rounded to float32 (torch's own hardsigmoid backward) is off by up to 6e-8, and no user's concern.
        severity = "warning" if (judged.error or 0.0) > _CONSTANT_ROUNDING else "note"
        code, verdict = "GC410", "approximate"
        message = f"the gradient of {leaf.name} is only approximately the derivative{by}."
    elif judged.verdict == "unresolved":
        code, severity, verdict = "GC406", "warning", "unresolved"
        budget = f" better than {judged.budget:.2e} (relative)" if judged.budget is not None else ""
        message = f"finite differences do not resolve the derivative by {leaf.name}{budget}; it is not judged."
        hint = "try --seed, or inputs away from a discontinuity."
    elif judged.verdict == "wrong":
        behind = f": behind {function_name(cause)}" if cause is not None else ""
        where = " where parameters that are zero here are moved away from zero" if judged.where == "away" else ""
        message = f"autograd's gradient of {leaf.name} is not the derivative{where}{by}{behind}."
    else:
        return None
    return Finding(
        code=code,
        severity=severity,  # type: ignore[arg-type]  # a literal above
        cause="GC408" if cause is not None else "GC407" if broken is not None and is_output_broken else None,
        quantity="gradient",
        tensor=leaf.name,
        verdict=verdict,  # type: ignore[arg-type]  # a literal above
        message=message,
        hint=hint,
        error=number(judged.error),
        allow=f"{code}:{leaf.name}",
        location=place,
    )


def tensor_result(
    leaf: Leaf,
    judged: TensorJudgement,
    *,
    broken: bool,
    rows: Iterable[ElementDifference],
    wrong: int | None,
) -> TensorResult:
    """Return one leaf's row of the report."""
    verdict: TensorVerdict = "reference-wrong" if broken or judged.verdict == "wrong" else judged.verdict
    if verdict == "same" and judged.where == "beside":
        verdict = "non-differentiable"
    elements = tuple(
        Element(
            index=row.index,
            reference=number(row.autograd),
            finite_difference=number(row.finite_difference),
            absolute_error=number(row.error),
            relative_error=number(row.error / abs(row.finite_difference) if row.finite_difference else math.inf),
        )
        for row in rows
    )
    finite = [row.error for row in rows if math.isfinite(row.error)]
    return TensorResult(
        quantity="gradient",
        tensor=leaf.name,
        verdict=verdict,
        shape=tuple(leaf.tensor.shape),
        dtype=str(leaf.native_dtype).removeprefix("torch."),
        tied=leaf.tied,
        error=number(judged.error),
        budget=number(judged.budget),
        max_abs=number(max(finite)) if finite else None,
        elements_wrong=wrong,
        worst=elements,
    )


def frozen_results(subject: Subject, pattern: str) -> list[TensorResult]:
    """Return a row for each parameter that does not ask for a gradient and whose name matches the glob."""
    module = module_of(optimized_inner(subject.model))
    if module is None:
        return []
    names = {parameter_name(name.replace("_orig_mod.", "")): each for name, each in module.named_parameters()}
    return [
        TensorResult(
            quantity="gradient",
            tensor=name,
            verdict="frozen",
            shape=() if is_lazy(parameter) else tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
        )
        for name, parameter in names.items()
        if not parameter.requires_grad and fnmatch.fnmatchcase(name, pattern)
    ]


def of_form(
    form: str, findings: list[Finding], tensors: list[TensorResult]
) -> tuple[list[Finding], list[TensorResult]]:
    """Return findings and rows in a form's name: what is wrong then is the form's gradient, and not eager's."""
    if form == "eager":
        return findings, tensors
    told = [
        msgspec.structs.replace(
            finding,
            code="GC402",
            verdict="wrong",
            message=finding.message.replace("autograd's gradient", f"{form}'s gradient"),
            allow=f"GC402:{finding.tensor}",
        )
        if finding.code == "GC401"
        else finding
        for finding in findings
    ]
    rows = [
        msgspec.structs.replace(row, verdict="wrong") if row.verdict == "reference-wrong" else row for row in tensors
    ]
    return told, rows


def cut_notes(recording: Recording, leaves: Sequence[Leaf], without: set[str]) -> list[Finding]:
    """Return a note for each place where the program cuts a value that moves, and whom that leaves without gradient.

    Args:
        recording: of the run at the point.
        leaves: all leaves.
        without: names of the leaves that have no gradient.
    """
    lost: dict[SourceLine | None, set[str]] = {}
    for cut in recording.cuts.values():
        if cut.moves:
            reached = leaves_behind(cut.sources, leaves) & without if without else set()
            lost.setdefault(cut.place, set()).update(reached)
    notes = [
        Finding(
            code="GC404",
            severity="note",
            message="a value is cut from the gradient here (detach, no_grad, item, requires_grad_(False), fake "
            "quantisation) and held fixed"
            + (f"; it leaves {listed(sorted(names))} without gradient." if names else "."),
            location=location(place),
        )
        for place, names in lost.items()
    ]
    estimated = (
        "the gradient of this random sample is an estimator that torch documents (implicit reparameterisation): "
    )
    return notes + [
        Finding(
            code="GC404",
            severity="note",
            message=f"{estimated}it is taken as it is, and not judged.",
            location=location(place),
        )
        for place in dict.fromkeys(recording.estimators)
    ]


def with_hooks(rows: Iterable[TensorResult], hooked: set[str]) -> list[TensorResult]:
    """Return the rows; what agrees only without its hooks is counted apart."""
    return [
        msgspec.structs.replace(row, verdict="behind-hook")
        if row.tensor in hooked and row.verdict in ("same", "non-differentiable")
        else row
        for row in rows
    ]


def hook_notes(recording: Recording, hooked: Sequence[str], *, changes: bool) -> list[Finding]:
    """Return a note for each hook that was set aside: the gradient was judged without it.

    Args:
        recording: of the run at the point.
        hooked: names of modules and parameters with hooks of their own.
        changes: whether any gradient is another with the hooks.
    """
    places = dict.fromkeys(recording.hooks)
    message = "a hook on gradients is set aside while checking: "
    message += "what it changes is not judged" if changes else "no gradient here is another with it"
    return [
        *(Finding(code="GC409", severity="note", message=f"{message}.", location=location(place)) for place in places),
        *(
            Finding(code="GC409", severity="note", message=f"{message} (on {name}).", location=Location(module=name))
            for name in hooked
        ),
    ]


def kink_note(names: Sequence[str]) -> Finding:
    """Return the note that the function has a kink at the user's point along these leaves."""
    return Finding(
        code="GC405",
        severity="note",
        verdict="non-differentiable",
        quantity="gradient",
        message="the function has a kink or jump at this point (relu at 0, a tie in max); these gradients were judged "
        f"1e-3 beside it: {listed(names)}.",
    )


def undifferentiated_note(name: str) -> Finding:
    """Return the note that an output moves with the leaves and has no gradient."""
    return Finding(
        code="GC418",
        severity="note",
        quantity="output",
        tensor=name,
        message=f"{name} changes with the parameters or inputs, but has no gradient: a custom Function marks it as not "
        "differentiable, or it is computed outside of autograd.",
    )


def too_large_notes(outputs: Mapping[str, int]) -> list[Finding]:
    """Return a note for each output some of whose elements (counted) absorb what the leaves do."""
    return [
        Finding(
            code="GC423",
            severity="note",
            quantity="output",
            tensor=name,
            message=f"{name} has {count} elements that are too large to change with the leaves (a mask of -1e30 that "
            "is added, perhaps): the gradient through them is not judged.",
        )
        for name, count in outputs.items()
    ]


def constant_inputs_note() -> Finding:
    """Return the note that the inputs' own gradients were left out."""
    return Finding(
        code="GC404",
        severity="note",
        message="the model raises when its float inputs ask for a gradient (it turns them to numpy, perhaps); they are "
        "given as constants, and only parameters are judged.",
    )


def not_replayed() -> Finding:
    """Return the finding that the program does other things when run again at the very same point."""
    return Finding(
        code="GC406",
        severity="warning",
        verdict="unresolved",
        quantity="gradient",
        message="with its cuts held fixed the model gives other outputs at the very same point: "
        "finite differences say little.",
    )


def native_gradient_findings(native: Baseline, already: set[str], untrained: set[str]) -> list[Finding]:
    """Return findings for gradients that overflow in the model's own dtype though they are finite in float64.

    Args:
        native: the run in the model's own dtype.
        already: names of the leaves whose gradient is not finite in float64 either.
        untrained: names of the inputs that are given without ``requires_grad`` to a model that has parameters: their
            gradient is not computed in training (a mask, times ``finfo.min``), so that it is noted only.
    """
    found = []
    for name, native_dtype in native.overflowing.items():
        if name in already:
            continue
        dtype = str(native_dtype).removeprefix("torch.")
        found.append(
            Finding(
                code="GC407",
                severity="note" if name in untrained else "error" if native_dtype == torch.float32 else "warning",
                quantity="gradient",
                tensor=name,
                message=f"the gradient of {name} is NaN or infinite in {dtype}, though finite in float64.",
                hint="scale the loss, or keep this part in a wider dtype.",
                allow=f"GC407:{name}",
            )
        )
    return found


def location(place: SourceLine | None, op: str | None = None, module: str | None = None) -> Location | None:
    """Return a place in the user's program for the report."""
    if place is None:
        return Location(op=op, module=module) if op or module else None
    file = Path(place[0])
    here = Path.cwd()
    shown = str(file.relative_to(here) if file.is_relative_to(here) else file)
    return Location(file=shown, line=place[1], module=module, op=op)


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
