"""The findings and rows of a comparison: GC301, GC302, GC303, GC304, GC305, GC306, GC402, GC403 and GC415."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradctl.comparison.arbiter import Arbiter
from gradctl.comparison.difference import FileDifference, ModelDifference, TensorDifference, dtype_name
from gradctl.comparison.model_comparison import RANDOM_INPUTS, ModelComparison
from gradctl.core.errors import listed
from gradctl.core.findings import Element, ErrorMap, Finding, TensorResult
from gradctl.core.names import Quantity, TensorVerdict
from gradctl.core.numbers import number
from gradctl.forms.form import Captured
from gradctl.gradients.guard import explaining
from gradctl.numerics.error_map import error_map
from gradctl.numerics.measures import relative_error
from gradctl.subject.frames import first_line

# The rows of one tensor cost 20 forwards and want a person's eye: only the worst few have them.
_TENSORS_WITH_ROWS = 3
_CODES: dict[Quantity, str] = {"output": "GC301", "buffer": "GC302", "gradient": "GC402"}
_SIDES: dict[TensorVerdict, str] = {
    "wrong": "finite differences agree with {reference}",
    "reference-wrong": "finite differences agree with {form}: {reference} is wrong",
    "differs": "finite differences cannot decide which is right",
}

_REFERENCE_IS_WRONG = "correct the backward in {reference} (gradctl gradcheck names it); {form} needs no change."


@dataclass(frozen=True, slots=True)
class _Words:
    """What messages call the two programs."""

    reference: str
    form: str

    @property
    def is_form(self) -> bool:
        """Whether a form was captured from the reference; if not, the candidate is a program of its own."""
        return self.reference == "eager"

    @property
    def made(self) -> str:
        return "captures the model and " if self.is_form else ""

    @property
    def allowed(self) -> str:
        return self.form.removeprefix("the ")


def findings_and_rows(comparison: ModelComparison, arbiter: Arbiter) -> tuple[list[Finding], list[TensorResult]]:
    """Return what a program gets wrong, worst first, and a row for each of its tensors."""
    words = _Words(comparison.reference_name, comparison.candidate.name)
    findings: list[Finding] = []
    rows: list[TensorResult] = []
    if comparison.raised:
        findings.append(_raises(words, comparison.raised))
    order = sorted(comparison.worst.items(), key=lambda item: (not item[1].differs, -item[1].severity))
    with_rows = [key for key, each in order if key[0] == "gradient" and each.differs][:_TENSORS_WITH_ROWS]
    for (quantity, name), each in order:
        verdict = _verdict(quantity, each, arbiter)
        elements: tuple[Element, ...] = ()
        count: int | None = None
        if (quantity, name) in with_rows:
            with explaining(f"the elements of {name}"):
                elements, count = arbiter.rows(each)
        row, ladder = _result(quantity, each, verdict, elements, count), arbiter.ladders.pop(name, None)
        if len(rows) < _TENSORS_WITH_ROWS or (quantity, name) in with_rows:
            row = msgspec.structs.replace(row, ladder=ladder, errors=_errors(each))
        rows.append(row)
        if each.differs:
            findings.append(_difference(words, quantity, verdict, each))
        elif each.rounding is not None:
            findings.append(_less_accurate(words, quantity, each))
        elif each.exceeds:
            findings.append(_flipped(words, each))
    return findings, rows


def output_result(each: FileDifference) -> TensorResult:
    """Return the row of an output of a file."""
    verdict: TensorVerdict = "same" if not each.differs else "unresolved" if each.is_unstable else "differs"
    return msgspec.structs.replace(_result("output", each, verdict), errors=_errors(each))


def _result(
    quantity: Quantity,
    each: TensorDifference[Any],
    verdict: TensorVerdict,
    elements: tuple[Element, ...] = (),
    count: int | None = None,
) -> TensorResult:
    tensor = each.reference if each.reference is not None else each.candidate
    return TensorResult(
        quantity=quantity,
        tensor=each.name,
        verdict=verdict,
        shape=tuple(tensor.shape) if tensor is not None else (),
        dtype=dtype_name(tensor.dtype) if tensor is not None else "none",
        error=number(each.error),
        budget=number(each.budget),
        elements_wrong=count,
        worst=elements,
    )


def stale_values(captured: Captured, expected: Mapping[str, Tensor], path: Path) -> list[Finding]:
    """Return a finding for each parameter and buffer whose value in a file is not the model's: it was trained on.

    Args:
        captured: the file.
        expected: the model's values by name.
        path: what messages call the file.
    """
    findings = []
    for name, kept in {**captured.parameters, **captured.buffers}.items():
        value = expected.get(name)
        if value is None or kept.shape != value.shape or torch.equal(kept, value):
            continue
        off = relative_error(value, kept)
        kind = "param" if name in captured.parameters else "buffer"
        findings.append(
            Finding(
                code="GC304",
                severity="error",
                tensor=f"{kind}:{name}",
                verdict="differs",
                message=f"{kind}:{name} in {path} is not the model's: off by {off:.2e} (relative).",
                hint="the file is of another state of the model; write it again, or load its weights with --weights.",
                error=number(off),
                allow=f"GC304:{kind}:{name}",
            )
        )
    return findings


def _errors(each: TensorDifference[Any]) -> ErrorMap | None:
    """Return where a tensor that differs is off; None if it is of another type."""
    reference, candidate = each.judged
    if not each.differs or reference is None or candidate is None or reference.shape != candidate.shape:
        return None
    wide = torch.complex128 if reference.is_complex() else torch.float64
    return error_map((candidate.to_dense().to(wide) - reference.to_dense().to(wide)).abs())


def _verdict(quantity: Quantity, each: ModelDifference, arbiter: Arbiter) -> TensorVerdict:
    if not each.differs:
        return "same" if each.rounding is None else "less-accurate"
    if each.is_missing:
        return "missing"
    if quantity == "gradient" and not each.structure and each.is_other_than_bias:
        with explaining(f"whose gradient of {each.name} is right"):
            return arbiter.verdict(each)
    return "differs"


def _difference(words: _Words, quantity: Quantity, verdict: TensorVerdict, each: ModelDifference) -> Finding:
    if each.bias is not None and not each.is_other_than_bias:
        return _biased(words, quantity, verdict, each)
    code = "GC403" if each.is_missing and quantity == "gradient" else _CODES[quantity]
    is_decided = verdict in _SIDES and quantity == "gradient"
    side = f"; {_SIDES[verdict].format(reference=words.reference, form=words.form)}" if is_decided else ""
    message, size = _message(words, _described(quantity, each.name), each, side)
    return Finding(
        code=code,
        severity="error",
        quantity=quantity,
        tensor=each.name,
        verdict=verdict,
        message=message,
        hint=_REFERENCE_IS_WRONG.format(reference=words.reference, form=words.form)
        if verdict == "reference-wrong"
        else "",
        error=number(size),
        allow=f"{code}:{each.name}",
    )


def _message(words: _Words, what: str, each: ModelDifference, side: str) -> tuple[str, float | None]:
    """Return how a form differs from the reference, and the relative error if that is how."""
    form, reference = words.form, words.reference
    where = "" if each.trial.name == "example" else f" with {each.trial.name}"
    where += f" at call {each.call}" if each.call > 1 else ""
    if each.is_missing:
        has, lacks = (form, reference) if each.reference is None else (reference, form)
        return f"{what} exists in {has}{where}, and not in {lacks}.", None
    if each.structure:
        return f"{what} is {each.structure} in {form}{where}.", None
    if each.requires_grad is not None and not (each.exceeds or each.means_another):
        requires, does_not = (form, reference) if each.requires_grad else (reference, form)
        return f"{what} requires a gradient in {requires}, and not in {does_not}.", None
    size = each.error if each.exceeds or each.meaning is None else each.meaning
    tolerance = f" (tolerance {each.budget:.2e})" if each.exceeds else " in float64"
    return f"{what} differs from {reference}'s in {form}{where}: relative error {size:.2e}{tolerance}{side}.", size


def _biased(words: _Words, quantity: Quantity, verdict: TensorVerdict, each: ModelDifference) -> Finding:
    """Return GC306: an error within the tolerance that does not average out."""
    return Finding(
        code="GC306",
        severity="error",
        quantity=quantity,
        tensor=each.name,
        verdict=verdict,
        message=f"{_described(quantity, each.name)} has a bias in {words.form}: over {RANDOM_INPUTS} random inputs an "
        f"error of {each.bias:.2e} (relative) does not average out as rounding does, although each single error is "
        f"within the tolerance of its dtype ({each.budget:.2e}).",
        hint="look for a missing or wrong scale, a cast that truncates, or a sum in a narrow dtype.",
        error=number(each.bias),
        allow=f"GC306:{each.name}",
    )


def _less_accurate(words: _Words, quantity: Quantity, each: ModelDifference) -> Finding:
    form, reference = words.form, words.reference
    limit = f"tolerance {each.budget:.2e}" if each.exceeds else f"more than four times {reference}'s own on all inputs"
    agree = "the two agree in float64, and on" if each.meaning is not None else "on"
    said = f"{agree} random inputs the error averages out as rounding does"
    return Finding(
        code="GC305",
        severity="warning",
        quantity=quantity,
        tensor=each.name,
        verdict="less-accurate",
        message=f"{_described(quantity, each.name)} is less accurate in {form} than in {reference}: relative error "
        f"{each.error:.2e} ({limit}). {said[0].upper()}{said[1:]} (root mean square {each.rounding:.2e}).",
        cause="GC305",
        cause_message=f"{form} is less accurate than {reference}: {said}.",
        hint=f"compare the precision that you need with this error, or use another kernel in {form}.",
        error=number(each.error),
        allow=f"GC305:{each.name}",
    )


def _described(quantity: Quantity, name: str) -> str:
    return {"output": name, "buffer": f"{name} after the call", "gradient": f"the gradient of {name}"}[quantity]


def _flipped(words: _Words, each: ModelDifference) -> Finding:
    return Finding(
        code="GC415",
        severity="note",
        quantity="gradient",
        tensor=each.name,
        verdict="same",
        message=f"the gradient of {each.name} differs in {words.form} with {each.trial.name} by {each.error:.2e} "
        "(relative), and not on fresh inputs: a relu or a max took the other side because of rounding.",
    )


def _raises(words: _Words, raised: Mapping[str, Exception]) -> Finding:
    where = "" if "example" in raised else f" with {listed(list(raised), 3)}"
    error = first_line(next(iter(raised.values())))
    return Finding(
        code="GC303",
        severity="error",
        message=f"{words.form} {words.made}raises{where} where {words.reference} runs: {error}.",
        allow=f"GC303:{words.allowed}",
    )
