"""Do the gradients hold as training takes them: with inputs as given, again on a retained graph, added to ``.grad``?

Finite differences judge one backward, with every float input requiring a gradient. Training gives inputs that require
none, may go through a graph twice, and accumulates: each must give the same gradient, in the model's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch
from torch import Tensor

from gradctl.core.errors import is_out_of_memory
from gradctl.core.findings import Finding, TensorResult, note
from gradctl.core.names import TensorVerdict
from gradctl.core.numbers import format_number, number
from gradctl.gradients.baseline import Baseline
from gradctl.numerics.measures import gaussian_like, is_float, norm, relative_error
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.example import trained_inputs
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.state import State
from gradctl.subject.subject import Subject

Gradients = dict[str, Tensor | None]
Outputs = dict[str, Tensor]
Difference = dict[str, float]  # by name of the leaf, relative; infinite for a gradient that is lost

# What the order of a sum explains, in machine epsilons: as between two runs of one regime.
_ROUNDING_EPSILONS = 1e3
_ULP_RUNS = 2


@dataclass(slots=True)
class Regimes:
    """What the other regimes showed: GC416 and GC417."""

    findings: list[Finding] = field(default_factory=list)
    # What the model computes from inputs that require no gradient, if that is something else and they are constants.
    own_outputs: Outputs | None = None


def compare_regimes(subject: Subject, native: Baseline) -> Regimes:
    """Return what differs between one backward with inputs that require gradients and what training does.

    The model repeats itself. What it raises in the regime in which it ran before is raised.
    """
    step = _Step(Instance(subject, input_mode=native.input_mode))
    regimes = Regimes()
    with step.instance.preserve_leaves():
        outputs, reference = step.run()
        _again(step, reference, regimes)
        _as_given(step, outputs, reference, regimes)
    return regimes


@dataclass(slots=True)
class _Step:
    """Runs forward and backward of one instance, alike each time."""

    instance: Instance

    def forward(self) -> tuple[Outputs, list[Tensor], list[Tensor]]:
        """Return the float outputs; those that have a gradient; and a cotangent for each, the same in every regime."""
        with torch.enable_grad():
            outputs = {name: t for name, t in self.instance.run() if is_float(t)}
        generator = torch.Generator().manual_seed(self.instance.subject.seed)
        drawn = {name: gaussian_like(t, generator) for name, t in outputs.items()}
        requiring = [name for name, t in outputs.items() if t.requires_grad]
        return outputs, [outputs[name] for name in requiring], [drawn[name] for name in requiring]

    def backward(self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, retain_graph: bool = False) -> None:
        """Let the gradients arrive in ``.grad``."""
        seed_generators(self.instance.subject.seed)
        torch.autograd.backward(outputs, [cotangent.clone() for cotangent in cotangents], retain_graph=retain_graph)

    def run(self) -> tuple[Outputs, Gradients]:
        """Return the outputs and gradients of one step; no gradients if no output has one."""
        outputs, differentiable, cotangents = self.forward()
        if differentiable:
            self.backward(differentiable, cotangents)
        return {name: t.detach().clone() for name, t in outputs.items()}, self.taken()

    def taken(self) -> Gradients:
        """Return the gradients, and clear them."""
        return {leaf.name: leaf.take_gradient() for leaf in self.instance.leaves}

    def given(self, gradients: Gradients) -> None:
        """Put gradients where the next backward adds to them."""
        for leaf in self.instance.leaves:
            gradient = gradients[leaf.name]
            if gradient is not None:
                leaf.tensor.grad = gradient.clone().reshape(leaf.tensor.shape)

    def cleared(self, gradients: Gradients) -> set[str]:
        """Return the names of the leaves that no longer have the ``.grad`` that they were given before forward."""
        return {
            leaf.name
            for leaf in self.instance.leaves
            if (given := gradients[leaf.name]) is not None
            and (leaf.tensor.grad is None or not torch.equal(leaf.tensor.grad.reshape(given.shape), given))
        }

    def noise(self, reference: Gradients) -> dict[str, float]:
        """Return the norm of each gradient's change as parameters and inputs move by one ULP."""
        return ulp_noise(self.instance, lambda: self.run()[1], reference)


def ulp_noise(
    instance: Instance, run: Callable[[], Mapping[str, Tensor | None]], reference: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """Return the norm of the change of each tensor that ``run`` returns as the leaves move by one ULP."""
    found = dict.fromkeys(reference, 0.0)
    generator = torch.Generator().manual_seed(instance.subject.seed)
    for _ in range(_ULP_RUNS):
        with instance.preserve_leaves():
            with torch.no_grad():
                for leaf in instance.leaves:
                    sign = gaussian_like(leaf.tensor, generator).real.sign()
                    leaf.tensor.mul_(1 + torch.finfo(leaf.tensor.dtype).eps * sign)
            moved = run()
        for name, value in reference.items():
            other = moved.get(name)
            if value is not None and other is not None and other.shape == value.shape:
                found[name] = max(found[name], norm(other - value))
    return found


def output_noise(subject: Subject, native: Baseline) -> dict[str, float]:
    """Return the norm of the change of each native output as the leaves move by one ULP."""
    step = _Step(Instance(subject, input_mode=native.input_mode))
    return ulp_noise(step.instance, lambda: step.forward()[0], native.outputs)


def _forward_watched(step: _Step) -> tuple[list[Tensor], list[Tensor], set[str]]:
    """Run forward; return what has a gradient, the cotangents, and the leaves that a backward inside of it reached."""
    arrived: set[str] = set()
    handles = []
    for leaf in step.instance.leaves:
        if leaf.tensor.is_leaf and leaf.tensor.requires_grad:
            hook = partial(lambda name, _: arrived.add(name), leaf.name)
            handles.append(leaf.tensor.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    try:
        _, differentiable, cotangents = step.forward()
    finally:
        for handle in handles:
            handle.remove()
    return differentiable, cotangents, arrived


def _again(step: _Step, reference: Gradients, regimes: Regimes) -> None:
    """Run backward onto an existing ``.grad`` with the graph retained, and then through that graph once more."""
    step.given(reference)
    cleared: set[str] = set()
    try:
        differentiable, cotangents, arrived = _forward_watched(step)
        # A forward that runs a backward of its own (an inner optimiser) clears what that left.
        cleared = step.cleared(reference) & arrived
        state = State([step.instance.model], [tensor for leaf in step.instance.leaves for tensor in leaf.sharing])
        step.backward(differentiable, cotangents, retain_graph=True)
        added = _added(step.taken(), reference)  # before the restoring, which knows the tensors in .grad too
        state.restore()
        step.backward(differentiable, cotangents)
        second = step.taken()
    except Exception as error:  # a Function that frees what it saved may raise anything the second time
        if is_out_of_memory(error):
            raise
        step.taken()
        message = f"a second backward on the retained graph raises: {first_line(error)}."
        regimes.findings.append(note("GC417", message))
        step.given(reference)
        added, second = _added(step.run()[1], reference), reference
    hint = "do not change in backward what it reads (ctx, a buffer), nor set or clear .grad in forward or backward."
    for gradients, what in (
        (added, "a backward that adds to an existing .grad"),
        (second, "a second backward on the graph"),
    ):
        for name, off in _differences(step, reference, gradients).items():
            if gradients is added and name in cleared:
                message = f"forward clears the .grad of {name}: gradients of several batches do not add up."
                regimes.findings.append(note("GC417", message))
                continue
            message = f"{what} gives {_another(off)} for {name} than the first."
            regimes.findings.append(_wrong("GC417", message, hint, name, off))


def _as_given(step: _Step, outputs: Outputs, reference: Gradients, regimes: Regimes) -> None:
    """Run the step with inputs that require a gradient only if the user's do."""
    subject = step.instance.subject
    inputs = [leaf.name for leaf in step.instance.leaves if leaf.name.startswith("input:")]
    trained = trained_inputs(subject.model, subject.args, subject.kwargs)
    step.instance.without_grad = frozenset(inputs) - trained
    if not step.instance.without_grad or len(inputs) == len(step.instance.leaves):
        return
    found = _run_as_given(step, regimes)
    if found is None:
        return
    own, gradients = found
    if any(name not in own or relative_error(value, own[name]) > _rounding(value) for name, value in outputs.items()):
        regimes.own_outputs = None if trained else own
        checked = "such inputs" if trained else "its inputs as given, as constants"
        message = f"the model computes another result if its inputs require gradients: it is checked with {checked}."
        regimes.findings.append(note("GC416", message))
    else:
        _compare_parameters(step, reference, gradients, regimes)


def _compare_parameters(step: _Step, reference: Gradients, gradients: Gradients, regimes: Regimes) -> None:
    parameters = {name: gradient for name, gradient in reference.items() if name not in step.instance.without_grad}
    hint = "checkpoint with use_reentrant=False; in a custom backward, read ctx.needs_input_grad of each argument."
    for name, off in _differences(step, parameters, gradients).items():
        message = f"in training, where the inputs require no gradient, {name} receives {_another(off)}."
        regimes.findings.append(_wrong("GC416", message, hint, name, off))


def _run_as_given(step: _Step, regimes: Regimes) -> tuple[Outputs, Gradients] | None:
    """Return outputs and gradients; None, with a note, if the model raises."""
    try:
        return step.run()
    except Exception as error:  # forces need a gradient of the input
        if is_out_of_memory(error):
            raise
        message = "the model raises an error if its inputs require no gradient, as given: "
        hint = "use inputs that require a gradient (requires_grad_()), as training must."
        regimes.findings.append(
            note("GC416", f"{message}{first_line(error)}. It is checked with inputs that require gradients.", hint)
        )
        return None
    finally:
        step.taken()


def _differences(step: _Step, reference: Gradients, gradients: Gradients) -> Difference:
    """Return the leaves whose gradient differs by more than rounding explains; infinite where it is lost."""
    found = _relative_differences(reference, gradients)
    if not found:
        return found
    noise = step.noise(reference)

    def is_rounding(name: str) -> bool:
        gradient = reference[name]
        assert gradient is not None
        size = norm(gradient)
        tolerance = _rounding(gradient) * size + 10 * noise[name]
        return found[name] * size <= tolerance

    # A gradient that is zero but for rounding is lost with nothing lost.
    return {
        name: error
        for name, error in found.items()
        if not (is_rounding(name) if math.isfinite(error) else norm(reference[name]) <= 10 * noise[name])  # type: ignore[arg-type]
    }


def _relative_differences(reference: Gradients, gradients: Gradients) -> Difference:
    """Return the leaves whose gradient differs by more than the order of a sum explains."""
    found: Difference = {}
    for name, gradient in reference.items():
        other = gradients[name]
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            continue
        if other is None:
            if bool(gradient.any()):
                found[name] = math.inf
        elif relative_error(gradient, other) > _rounding(gradient):
            found[name] = relative_error(gradient, other)
    return found


def _rounding(tensor: Tensor) -> float:
    return _ROUNDING_EPSILONS * torch.finfo(tensor.dtype).eps


def _another(error: float) -> str:
    return "none" if math.isinf(error) else f"another gradient (relative difference {format_number(number(error))})"


def _wrong(code: str, message: str, hint: str, name: str, error: float) -> Finding:
    verdict: TensorVerdict = "missing" if math.isinf(error) else "differs"
    return Finding(
        code=code,
        severity="error",
        quantity="gradient",
        tensor=name,
        verdict=verdict,
        message=message,
        hint=hint,
        error=number(error) if math.isfinite(error) else None,
        allow=f"{code}:{name}",
    )


def about(findings: Iterable[Finding], rows: Iterable[TensorResult]) -> list[Finding]:
    """Return the findings about tensors that have a row, and those about none."""
    names = {None, *(row.tensor for row in rows)}
    return [finding for finding in findings if finding.tensor in names]


def with_verdicts(rows: Iterable[TensorResult], findings: Sequence[Finding]) -> list[TensorResult]:
    """Return the rows, what agrees in the judged regime with its verdict in another, where that is worse."""
    worse = {finding.tensor: finding for finding in reversed(findings) if finding.severity == "error"}
    return [
        msgspec.structs.replace(row, verdict=found.verdict, error=found.error)
        if (found := worse.get(row.tensor)) is not None and row.verdict in ("same", "non-differentiable")
        else row
        for row in rows
    ]


def _added(accumulated: Gradients, before: Gradients) -> Gradients:
    """Return what a backward added to what was in ``.grad``."""
    zero = torch.zeros(())
    return {
        name: accumulated[name] if there is None else (zero if (now := accumulated[name]) is None else now) - there
        for name, there in before.items()
    }
