"""From judgements about gradients to findings and tensor results: the words of GC401 to GC414."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradctl.core.findings import Element, Finding, Location, TensorResult
from gradctl.core.names import Severity, TensorVerdict, parameter_name
from gradctl.core.numbers import number
from gradctl.gradients.baseline import Baseline
from gradctl.gradients.functions.function_part import FunctionFault, function_name, source_place
from gradctl.gradients.guard import explaining
from gradctl.numerics.elements import WorstElements
from gradctl.numerics.error_map import error_map
from gradctl.numerics.judge import TensorJudgement
from gradctl.subject.instance import Leaf
from gradctl.subject.signature import module_of, optimized_inner
from gradctl.subject.subject import Subject
from gradctl.tracing.tracer import SourceLine

# A constant rounded to float32 (torch's own hardsigmoid backward) is off by up to 6e-8, and no user's concern.
_CONSTANT_ROUNDING = 1e-7


class _Text(NamedTuple):
    code: str
    severity: Severity
    verdict: TensorVerdict
    message: str
    hint: str = ""


# By verdict on a gradient, ``nonfinite`` for one that is NaN or infinite; there is nothing to say about the others.
_TEXTS = {
    "wrong": _Text(
        "GC401", "error", "reference-wrong", "autograd's gradient of {name} is not the derivative{where}{by}{behind}."
    ),
    "missing": _Text(
        "GC403",
        "error",
        "missing",
        "autograd computes no gradient of {name}, but the output depends on it.",
        "look for a custom backward that returns None, or a tensor rebuilt outside autograd (numpy, new_tensor).",
    ),
    "unresolved": _Text(
        "GC406",
        "warning",
        "unresolved",
        "finite differences do not resolve the derivative with respect to {name}{budget}; it is not checked.",
        "try --seed, or inputs away from a discontinuity.",
    ),
    "nonfinite": _Text(
        "GC407",
        "error",
        "reference-wrong",
        "the gradient of {name} is NaN or infinite in {bad} of {count} elements.",
        "a branch not taken still passes NaN (where with sqrt or log): make its argument safe before the where.",
    ),
    "approximate": _Text(
        "GC410", "warning", "approximate", "the gradient of {name} is only approximately the derivative{by}."
    ),
}

_RULES: dict[str, tuple[str, str]] = {
    "first": ("GC408", "a straight-through or reversed gradient differs intentionally: then accept it"),
    "memory": (
        "GC408",
        "read inputs and incoming gradients with torch operations, not by strides, offsets or data_ptr(), save what "
        "backward reads with ctx.save_for_backward, and return a gradient for each input that requires one",
    ),
    "linear": ("GC408", "a gradient that is clipped or quantised intentionally: then accept it"),
    "layout": (
        "GC408",
        "read the incoming gradient with torch operations, not by its memory, never write to it, and accept None for "
        "an output without a gradient",
    ),
    "forward-mode": ("GC413", "make jvp the derivative of forward"),
    "second": ("GC414", "mark backward @once_differentiable, or save inputs and outputs with ctx.save_for_backward"),
}


class GradientCause(NamedTuple):
    """The rule code of the finding that explains another one, and what it is about."""

    code: str
    name: str


def cause_of(fault: FunctionFault) -> GradientCause:
    """Return a faulty Function as the cause of gradients that are wrong."""
    name = function_name(fault.function)
    return GradientCause(_RULES[fault.rule][0], f"the double backward of {name}" if fault.rule == "second" else name)


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
    """Return the finding for what a Function does wrong for callers other than this model.

    A warning; a note for a second derivative, which most Functions do not claim to have.
    """
    if fault.caller == "kink":  # at this very point; but any value there may be what its author wants
        return function_finding(fault, module, severity="warning")
    if fault.caller == "second-order":
        return function_finding(fault, module, severity="note")
    why = "this model does not do that"
    if fault.caller == "elsewhere":
        why = "this model moves its inputs along directions in which it is right"
    return function_finding(replace(fault, message=f"latent: {fault.message}; {why}"), module, severity="warning")


def gradient_finding(
    leaf: Leaf,
    judged: TensorJudgement,
    cause: GradientCause | None,
    nonfinite: Tensor | None,
    *,
    is_output_nonfinite: bool = False,
) -> Finding | None:
    """Return the finding about one leaf's gradient, or None if there is nothing to say.

    ``cause`` is the Function that makes it wrong; ``nonfinite`` a mask of the gradient's elements that are NaN or
    infinite, None if there is none. An output that is NaN is the cause of a gradient that is.
    """
    text = _TEXTS.get("nonfinite" if nonfinite is not None else judged.verdict)
    if text is None:
        return None
    is_constant_rounding = text.code == "GC410" and (judged.error or 0.0) <= _CONSTANT_ROUNDING
    is_of_output = nonfinite is not None and is_output_nonfinite
    return Finding(
        code=text.code,
        severity="note" if is_constant_rounding else text.severity,
        cause=cause.code if cause is not None else "GC407" if is_of_output else None,
        quantity="gradient",
        tensor=leaf.name,
        verdict=text.verdict,
        message=text.message.format(name=leaf.name, **_details(leaf, judged, cause, nonfinite)),
        hint="an output is NaN, and this with it: begin there." if is_of_output else text.hint,
        error=number(judged.error),
        allow=f"{text.code}:{leaf.name}",
        location=_module_of(leaf),
    )


def _module_of(leaf: Leaf) -> Location | None:
    """Return the module of a parameter; None for an input, and for a parameter of the model itself."""
    kind, _, name = leaf.name.partition(":")
    module = name.rpartition(".")[0]
    return Location(module=module) if kind == "param" and module else None


def _details(
    leaf: Leaf, judged: TensorJudgement, cause: GradientCause | None, nonfinite: Tensor | None
) -> dict[str, str | int]:
    """Return what fills the messages of ``_TEXTS``; empty if it does not apply."""
    return {
        "bad": int(nonfinite.sum()) if nonfinite is not None else 0,
        "count": leaf.tensor.numel(),
        "by": f" (relative error {judged.error:.2e})" if judged.error is not None else "",
        "budget": f" better than {judged.budget:.2e} (relative)" if judged.budget is not None else "",
        "behind": f": behind {cause.name}" if cause is not None else "",
        "where": " where parameters that are zero here are moved away from zero" if judged.where == "away" else "",
    }


def tensor_result(leaf: Leaf, judged: TensorJudgement, *, nonfinite: bool, elements: WorstElements) -> TensorResult:
    """Return one leaf's row of the report."""
    verdict: TensorVerdict = "reference-wrong" if nonfinite or judged.verdict == "wrong" else judged.verdict
    if verdict == "same" and judged.where == "beside":
        verdict = "non-differentiable"
    worst = tuple(
        Element(
            index=row.index,
            component=row.component,
            reference=number(row.autograd),
            finite_difference=number(row.finite_difference),
            absolute_error=number(row.error),
            relative_error=number(row.error / abs(row.finite_difference) if row.finite_difference else math.inf),
        )
        for row in elements.rows
    )
    finite = [row.error for row in elements.rows if math.isfinite(row.error)]
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
        elements_wrong=elements.wrong,
        worst=worst,
        errors=error_map(elements.errors) if elements.errors is not None else None,
    )


def frozen_results(subject: Subject, pattern: str) -> list[TensorResult]:
    """Return a row for each parameter that requires no gradient and whose name matches the glob."""
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
    renamed = [
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
    return renamed, rows


def with_hooks(rows: Iterable[TensorResult], hooked: set[str]) -> list[TensorResult]:
    """Return the rows; what agrees only without its hooks is counted apart."""
    return [
        msgspec.structs.replace(row, verdict="behind-hook")
        if row.tensor in hooked and row.verdict in ("same", "non-differentiable")
        else row
        for row in rows
    ]


def native_gradient_findings(native: Baseline, already: set[str], untrained: set[str]) -> list[Finding]:
    """Return findings for gradients that overflow in the model's own dtype though they are finite in float64.

    ``already`` names the leaves whose gradient is not finite in float64 either. That of ``untrained`` inputs (a mask,
    times ``finfo.min``) is not computed in training: it is noted only.
    """
    return [
        Finding(
            code="GC407",
            severity="note" if name in untrained else "error" if dtype == torch.float32 else "warning",
            quantity="gradient",
            tensor=name,
            message=f"the gradient of {name} is NaN or infinite in {str(dtype).removeprefix('torch.')}, though finite "
            "in float64.",
            hint="scale the loss, or keep this part in a wider dtype.",
            allow=f"GC407:{name}",
        )
        for name, dtype in native.overflowing.items()
        if name not in already
    ]


def location(place: SourceLine | None, op: str | None = None, module: str | None = None) -> Location | None:
    """Return a place in the user's program for the report."""
    if place is None:
        return Location(op=op, module=module) if op or module else None
    file = Path(place[0])
    here = Path.cwd()
    shown = str(file.relative_to(here) if file.is_relative_to(here) else file)
    return Location(file=shown, line=place[1], module=module, op=op)
