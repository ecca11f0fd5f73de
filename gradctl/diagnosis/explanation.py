"""Findings on a form with their causes: observations first, then experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradctl.comparison.compare import call_differences, tensors_of
from gradctl.comparison.difference import Key, dtype_name
from gradctl.comparison.form_comparison import FormComparison
from gradctl.comparison.program import run_calls
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ModelTrial
from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, note
from gradctl.core.names import Quantity
from gradctl.diagnosis.causes import Cause, Intervention, Search, state_causes
from gradctl.diagnosis.experiments import branch_notes, call_once, experiments, few, generators_moved, place_of_draw
from gradctl.forms import eager
from gradctl.forms.form import Captured, Outcome
from gradctl.forms.onnx.from_file import without_optimizer
from gradctl.inspection.model import observe_call, training_modes
from gradctl.numerics.measures import same_values
from gradctl.subject.instance import Instance, native_dtype
from gradctl.subject.signature import module_of
from gradctl.subject.state import State


@dataclass(slots=True)
class PreRunObservations:
    """Observations of a form before and between its runs.

    Attributes:
        moved: buffers of the form whose first values are not the model's.
        split: parameters that are one tensor in the model, and several with other values in the form.
        causes: found by running the form again.
    """

    moved: dict[str, Tensor] = field(default_factory=dict)
    split: dict[str, Tensor] = field(default_factory=dict)
    causes: dict[Key, Cause] = field(default_factory=dict)

    @staticmethod
    def of(captured: Captured, reference: Reference) -> PreRunObservations:
        """Return the state of a form before its first run, as far as it differs from the model's."""
        instance = reference.trials[0].instance
        instance.restore()
        module = module_of(instance.model)
        own = dict(module.named_buffers(remove_duplicate=False)) if module is not None else {}
        held = captured.buffers_now()
        of_shape = [name for name, value in own.items() if name in held and held[name].shape == value.shape]
        moved = {name: held[name].detach().clone() for name in of_shape if not _equal(held[name], own[name])}
        return PreRunObservations(moved, _split_parameters(captured, instance))

    def ask(self, comparison: FormComparison) -> None:
        """Run the form again, if it is wrong on the native runs: in plain onnxruntime, and from other generators."""
        search = Search(comparison)
        wrong = {key for key in search.open() if key in comparison.worst}
        if not wrong or comparison.raised:
            return
        if cause := _OF_RUNTIME.get(comparison.captured.form):
            self.causes.update(dict.fromkeys(_right_in_plain_runtime(search, wrong), cause))
        if generators_moved(comparison.reference.instance()):
            self.causes = {**dict(_redrawn(comparison, wrong)), **self.causes}


def _split_parameters(captured: Captured, instance: Instance) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for leaf in instance.leaves:
        names = [name.removeprefix("param:") for name in (leaf.name, *leaf.tied)]
        values = {name: captured.parameters[name] for name in names if name in captured.parameters}
        if not all(_equal(value, next(iter(values.values()))) for value in values.values()):
            split |= {name: value.detach().clone() for name, value in values.items()}
    return split


def explain_findings(
    findings: Sequence[Finding], comparison: FormComparison, witness: PreRunObservations
) -> list[Finding]:
    """Return the findings on a form, each with its cause if an experiment confirms one.

    Where a difference stays open, a note comes first that says what explains most of them: GC220.

    Args:
        findings: of the form, without causes.
        comparison: of the form.
        witness: observations of the form.
    """
    search = Search(comparison)
    if not search.open():
        return [*findings, *branch_notes(search)]
    causes = {**dict(_observed(comparison)), **witness.causes}
    search.causes(_started_otherwise(comparison.captured.form, witness), causes)
    search.causes(experiments(search), causes)
    found = state_causes(findings, causes)
    return [*usual_reasons(comparison.reference, found), *found]


def usual_reasons(reference: Reference, findings: Sequence[Finding]) -> list[Finding]:
    """Return a note with the usual reasons for a difference that apply here, if an error has no cause: GC220."""
    if all(each.cause or each.severity != "error" for each in findings):
        return []
    usual = "; ".join(_usual(reference))
    hint = "rule these out first: --eval, float32 or float64."
    return [note("GC220", f"before the numbers: {usual}.", hint)] if usual else []


def _observed(comparison: FormComparison) -> Iterator[tuple[Key, Cause]]:
    """Yield causes that the tensors show: another dtype, an input that only one side has changed."""
    form = comparison.captured.form
    for (quantity, name), each in comparison.worst.items():
        if not each.differs:
            continue
        eager, own = each.reference, each.candidate
        if eager is not None and own is not None and eager.dtype != own.dtype:
            words = f"{form} computes it in {dtype_name(own.dtype)}, and eager in {dtype_name(eager.dtype)}"
            yield (quantity, name), Cause("GC214", words, "cast where the dtype matters: x.to(torch.float32).")
        elif quantity == "buffer" and name.startswith("input:"):
            who = f"eager changes {name} in place, and {form} does not"
            if each.reference is None:
                who = f"{form} changes {name} in place, and eager does not"
            elif each.candidate is not None:
                who = f"{form} changes {name} in place in another way than eager"
            yield (quantity, name), Cause("GC213", who, "change a copy of the input, and return it.")


# ------------------------------------------------------------------ the form, run again

_OF_RUNTIME = {
    "onnx": Cause(
        "GC216",
        "onnxruntime's graph optimiser changes it: with the optimiser off the file computes what eager does",
        "set SessionOptions.graph_optimization_level to ORT_DISABLE_ALL or ORT_ENABLE_BASIC, and report it.",
    ),
    "openvino": Cause(
        "GC216",
        "OpenVINO changes it: in onnxruntime the same file computes what eager does",
        "report it to OpenVINO, with the file that gradctl export writes.",
    ),
}


def _right_in_plain_runtime(search: Search, wrong: set[Key]) -> Iterator[Key]:
    """Yield the tensors that agree if the file is run by onnxruntime without its graph optimiser."""
    try:
        plain = without_optimizer(search.comparison.captured, search.reference.subject.provider)
    except TargetError:
        return
    for trial in search.reference.trials:
        here = {key: each.call for key, each in search.worst_on(trial).items() if key in wrong}
        if here:
            calls = run_calls(plain, trial.instance, search.comparison.program.state, calls=max(here.values()))
            if calls[-1].error is None:
                yield from (key for key, call in here.items() if _agrees(trial, calls, call, key))


def _agrees(trial: ModelTrial, calls: Sequence[Outcome], call: int, key: Key) -> bool:
    """Return whether a tensor of one call, counted from 1, is that of eager."""
    found = dict(call_differences(trial, call - 1, calls[call - 1], frozenset({key[0]}))).get(key)
    return found is not None and not (found.is_missing or found.structure or found.exceeds)


def _redrawn(comparison: FormComparison, wrong: set[Key]) -> Iterator[tuple[Key, Cause]]:
    """Yield the tensors that use other generators than in eager: from one seed eager repeats them, the form does not.

    Two calls from one seed show it; for gradients, a random number that is generated between forward and backward.
    """
    trial = comparison.reference.trials[0]
    own = eager.capture(trial.instance)
    place = place_of_draw(comparison.reference.instance(), ["torch"])
    explained: set[Key] = set()
    for runs, words in (
        (_two_calls, "draws other random numbers in each call from one seed, and eager draws the same"),
        (_moved_before_backward, "draws random numbers again in its backward, and eager reuses those of the forward"),
    ):
        forms, eagers = runs(comparison.captured, trial, comparison.program.state), runs(own, trial, State([]))
        if forms is None or eagers is None:
            continue
        hint = "draw the numbers outside and pass them as an input, or compare in evaluation mode."
        cause = Cause("GC210", f"{comparison.captured.form} {words}", hint, place)
        found = {key for key in wrong - explained if _repeats(eagers, *key) and not _repeats(forms, *key)}
        explained |= found
        yield from ((key, cause) for key in found)


_Pair = tuple[Outcome, Outcome]


def _two_calls(captured: Captured, trial: ModelTrial, state: State) -> _Pair | None:
    calls = run_calls(captured, trial.instance, state, calls=2)
    return None if calls[-1].error is not None else (calls[0], calls[1])


def _moved_before_backward(captured: Captured, trial: ModelTrial, state: State) -> _Pair | None:
    """Return two runs from one seed; in the second, a random number is generated between forward and backward."""
    entered = 0

    def moving() -> AbstractContextManager[Any]:
        nonlocal entered
        entered += 1
        if entered > 1:  # around the backward
            torch.rand(1)
        return nullcontext()

    plain = run_calls(captured, trial.instance, state, calls=1)[0]
    moved = run_calls(captured, trial.instance, state, calls=1, context=moving)[0]
    return None if plain.error or moved.error else (plain, moved)


def _repeats(pair: _Pair, quantity: Quantity, name: str) -> bool:
    return _equal(*(tensors_of(outcome, quantity).get(name) for outcome in pair))


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and same_values(first.detach(), second.detach())


# ------------------------------------------------------------------ initial state of the form


def _started_otherwise(form: str, witness: PreRunObservations) -> Iterator[Intervention]:
    """Return eager that starts with what the form starts with: statistics moved while capturing, weights untied."""
    if witness.moved:
        started = f"{form} starts with other values of {few(witness.moved, 3)} than the model has: "
        words = "capturing runs a model, which moves its buffers"
        hint = "capture a copy (copy.deepcopy), or load the state dict again after capturing."
        if form == "executorch":
            words = "the initial values of buffers that the forward changes are not in its file"
            hint = f"add InitializedMutableBufferPass({list(witness.moved)}) to the passes of ExecutorchBackendConfig."
        yield Intervention(
            Cause("GC211", started + words, hint),
            call=lambda instance: _with_buffers(instance, witness.moved),
        )
    if witness.split:
        yield Intervention(
            Cause(
                "GC212",
                f"{form} has {few(witness.split, 3)} as tensors with values of their own, and the model ties them",
                "train and save them tied: one parameter under both names, loaded with load_state_dict.",
            ),
            call=lambda instance: _with_parameters(instance, witness.split),
        )


def _with_buffers(instance: Instance, values: dict[str, Tensor]) -> Callable[..., Any]:
    """Return the model, whose buffers have these values before the first call."""
    pending = [values]

    def call(*args: Any, **kwargs: Any) -> Any:
        module: Any = module_of(instance.model)
        named = dict(module.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, value in pending.pop().items() if pending else ():
                named[name].copy_(value)
        return instance.model(*args, **kwargs)

    return call


def _with_parameters(instance: Instance, values: dict[str, Tensor]) -> Callable[..., Any]:
    """Return the model with other values of its parameters, whose gradients arrive at the parameters all the same."""

    def call(*args: Any, **kwargs: Any) -> Any:
        module: Any = module_of(instance.model)
        own = dict(module.named_parameters(remove_duplicate=False))
        given = {name: own[name] + (value.to(own[name].dtype) - own[name]).detach() for name, value in values.items()}
        return torch.func.functional_call(module, given, args, kwargs, tie_weights=False)

    return call


# ------------------------------------------------------------------ usual reasons for differences


def _usual(reference: Reference) -> Iterator[str]:
    """Yield the usual reasons for a difference that apply here."""
    instance = reference.instance()
    if _depends_on_mode(instance):
        for each in training_modes(module_of(instance.model)):
            yield f"{each.name}: {each.message}"
    for each in observe_call(instance, []):
        if each.kind == "random numbers":
            yield f"random numbers are drawn ({each.name}, {each.location})"
    dtype = native_dtype(reference.subject)
    if dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield f"the model computes in {name}, which rounds by {torch.finfo(dtype).eps:.0e}"
    on_gpu = any(leaf.tensor.is_cuda for leaf in instance.leaves)
    if on_gpu and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        yield "TF32 is allowed, which rounds products to 10 bits"


def _depends_on_mode(instance: Instance) -> bool:
    """Return whether the model computes something else in evaluation mode: one that is in it already does not."""
    module = module_of(instance.model)
    if module is None:
        return False

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        module.eval()
        return instance.model(*args, **kwargs)

    first, second = (call_once(instance, call) for call in (instance.model, evaluated))
    return not all(_equal(value, second.get(name)) for name, value in first.items())
