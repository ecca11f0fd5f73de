"""The findings and rows of a variant of the training step: GC430, GC432, GC433."""

from __future__ import annotations

from gradctl.core.findings import Finding, TensorResult
from gradctl.core.names import TensorVerdict
from gradctl.core.numbers import number
from gradctl.subject.frames import first_line
from gradctl.training.step_comparison import StepComparison, StepDifference
from gradctl.training.variant_comparison import VariantComparison


def step_findings(compared: VariantComparison) -> list[Finding]:
    """Return what differs: at the first step that differs, the first tensor in the order of computation."""
    name, failing = compared.variant.name, compared.failing
    found = []
    if compared.raised is not None:
        error, step = compared.raised
        found.append(
            Finding(
                code="GC432",
                severity="error",
                message=f"{name} raises at step {step}, where the plain step runs: {first_line(error)}.",
                allow=f"GC432:{name}",
            )
        )
    if failing is not None and failing.updates is not None:
        found.append(_updates(name, failing, failing.updates))
    if failing is not None and failing.first:
        found.append(_difference(name, failing))
    return found


def step_rows(compared: VariantComparison) -> list[TensorResult]:
    """Return a row for each tensor: its largest difference over the steps."""
    return [
        TensorResult(
            quantity=each.key[0],
            tensor=each.key[1],
            verdict=_verdict(each),
            shape=each.shape,
            dtype=each.dtype,
            error=number(each.error),
            budget=number(each.tolerance),
        )
        for each in compared.worst.values()
    ]


def _verdict(each: StepDifference) -> TensorVerdict:
    if each.differs:
        return "missing" if each.is_missing else "differs"
    return "too-small" if each.is_cancelled else "same"


def _difference(name: str, failing: StepComparison) -> Finding:
    first = failing.first[0]
    what = _described(first)
    if first.structure:
        said = f"{name}: {what} {first.structure} at step {first.step}"
    else:
        said = (
            f"{name}: {what} differs from the plain step's at step {first.step}: relative error {first.error:.1e} "
            f"(tolerance {first.tolerance:.1e}, {failing.precision})"
        )
    return Finding(
        code="GC430",
        severity="error",
        quantity=first.key[0],
        tensor=first.key[1],
        verdict=_verdict(first),
        message=f"{said}.",
        error=number(first.error),
        allow=f"GC430:{first.key[1]}",
    )


def _updates(name: str, failing: StepComparison, updates: tuple[int, int]) -> Finding:
    plain, own = (f"{count} {'time' if count == 1 else 'times'}" for count in updates)
    return Finding(
        code="GC433",
        severity="error",
        message=f"{name} calls optimizer.step() {own} in step {failing.steps}, and the plain step {plain}.",
        allow=f"GC433:{name}",
    )


def _described(each: StepDifference) -> str:
    quantity, name = each.key
    if quantity == "output":
        return "the loss"
    if quantity == "gradient":
        return f"the gradient of {name}"
    if name.startswith("optimizer:"):
        key, _, of = name.removeprefix("optimizer:").partition(".")
        return f"the optimizer's {key} of {of}" if of and not of.isdigit() else f"the optimizer's {key}"
    return f"{name} after the step"
