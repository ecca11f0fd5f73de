"""The findings and rows of a variant of the training step: GC430 to GC434."""

from __future__ import annotations

from gradctl.core.findings import Finding, Location, TensorResult, note
from gradctl.core.names import TensorVerdict
from gradctl.core.numbers import number
from gradctl.core.training import Training
from gradctl.gradients.gradient_findings import location
from gradctl.subject.frames import first_line
from gradctl.subject.signature import module_of
from gradctl.training.step_comparison import StepComparison, StepDifference
from gradctl.training.variant_comparison import VariantComparison


def step_findings(compared: VariantComparison) -> list[Finding]:
    """Return what differs: at the first step that differs, the first tensor in the order of computation."""
    name, failing = compared.variant.name, compared.failing
    found = []
    if compared.draws:
        found.append(_draws(name, compared))
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
        cause = "GC431" if compared.draws and not compared.has_means else None
        found.append(_difference(name, failing, cause, _place(compared, failing.first[0])))
    if compared.flipped is not None:
        found.append(_flipped(name, compared.flipped))
    return found


def summarise_training(compared: VariantComparison, steps: int) -> Training:
    """Return what was compared, of ``steps`` plain ones."""
    first = compared.failing
    return Training(
        steps=steps,
        optimizer=compared.runs.recipe.optimizer.name,
        loss=compared.runs.loss,
        first_difference=first.steps if first is not None else None,
    )


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


def _place(compared: VariantComparison, first: StepDifference) -> Location | None:
    """Return the line of the user's step, and the module of the parameter that differs first."""
    code = getattr(compared.variant.own, "__code__", None)
    line = (code.co_filename, code.co_firstlineno) if code is not None else None
    kind, _, name = first.key[1].partition(":")
    owner = name.rpartition(".")[0]
    module = module_of(compared.runs.recipe.subject.model) if kind == "param" and owner else None
    found = dict(module.named_modules()).get(owner) if module is not None else None
    return location(line, type(found).__name__ if found is not None else None, owner if found is not None else None)


def _difference(name: str, failing: StepComparison, cause: str | None, place: Location | None) -> Finding:
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
        cause=cause,
        location=place,
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


def _draws(name: str, compared: VariantComparison) -> Finding:
    if compared.draws_nothing:
        said = "Dropout is off in this step. Without it, both are compared"
        hint = "call model.train(), unless the step is meant to run without dropout."
    elif compared.has_means:
        said = "Both are compared with each random number replaced by its mean (dropout is the identity)"
        hint = "what is found below does not depend on random numbers."
    else:
        said = "A forward that is computed again does not see the numbers of the first one"
        hint = "keep the state of the generators: torch.utils.checkpoint does unless preserve_rng_state=False."
    return Finding(
        code="GC431",
        severity="error" if compared.draws_nothing else "warning",
        message=f"{name} uses other random numbers than the plain step: it {compared.draws}. {said}.",
        hint=hint,
        allow=f"GC431:{name}",
    )


def _flipped(name: str, each: StepDifference) -> Finding:
    return note(
        "GC434",
        f"{name}: {_described(each)} differs at step {each.step} by {each.error:.1e} (relative), and not in float64 "
        "nor on fresh batches: a relu or a max took the other side because of rounding.",
        quantity=each.key[0],
        tensor=each.key[1],
        verdict="same",
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
