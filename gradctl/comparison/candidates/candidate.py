"""Another implementation as a program that runs on the inputs of the reference, with the reference's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradctl.comparison.candidates.pairing import Pairing, copy_values, pair_tensors
from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key, ModelDifference
from gradctl.comparison.model_comparison import RANDOM_INPUTS, ModelComparison, meaning_of
from gradctl.comparison.precision import bias_of, lost_precision, relative_error_of
from gradctl.comparison.program import CALLS, run_copy
from gradctl.comparison.trials import ALL_QUANTITIES, ModelTrial
from gradctl.core.errors import TargetError
from gradctl.core.names import Quantity, buffer_name, input_name, parameter_name
from gradctl.forms.form import CannotCapture, Captured, Outcome, named_tensors
from gradctl.numerics.agreement import largest_scale
from gradctl.subject.inputs.example import Inputs, input_names
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.signature import POSITIONAL, call_signature, function_class, module_of
from gradctl.subject.subject import Subject
from gradctl.subject.tree import map_leaves


@dataclass(frozen=True, slots=True, eq=False)
class Paired:
    """A candidate that has the reference's values.

    Attributes:
        subject: the candidate, a private copy.
        pairing: which of its tensors is which of the reference.
        names: the reference's name of each tensor of the candidate that has a partner, as reports write them.
    """

    subject: Subject
    pairing: Pairing
    names: dict[str, str]


def pair(
    reference: Subject, candidate: Subject, renamed: Sequence[tuple[str, str]] = (), *, own_values: bool = False
) -> Paired:
    """Return a copy of the candidate with the reference's values.

    Args:
        reference, candidate: not changed.
        renamed: names of the reference and of the candidate, as ``parse_map`` returns them.
        own_values: whether the candidate keeps its values: then parameters need no partner.

    Raises:
        TargetError: GC124 if a parameter of either has no partner, or as ``pair_tensors``; GC112 if one of them cannot
            be copied.
    """
    instance, copied = Instance(reference), Instance(candidate, keep_hooks=True)
    tensors, own_tensors = _tensors(instance), _tensors(copied)
    found = pair_tensors(tensors, own_tensors, renamed)
    if not own_values:
        _ensure_paired(found)
        copy_values(tensors[0] | tensors[1], own_tensors[0] | own_tensors[1], found.partners)
    is_function = function_class(candidate.model) is not None
    model = candidate.model if is_function else copied.model
    names = {
        (parameter_name if own in own_tensors[0] else buffer_name)(own): (
            parameter_name if name in tensors[0] else buffer_name
        )(name)
        for own, name in found.partners.items()
    }
    return Paired(replace(candidate, model=model), found, names)


def _tensors(instance: Instance) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers by each name; parameters include what requires a gradient without being one."""
    parameters, buffers = named_tensors(module_of(instance.model))
    held = {
        name.removeprefix("param:"): leaf.tensor
        for leaf in instance.leaves
        for name in (leaf.name, *leaf.tied)
        if name.startswith("param:")
    }
    return {**parameters, **{name: each for name, each in held.items() if name not in parameters}}, buffers


def _ensure_paired(found: Pairing) -> None:
    lacking = [
        f"{kind} of the {whose} without a partner: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        for kind, whose, names in (
            ("parameters", "reference", found.unpaired_reference),
            ("parameters", "candidate", found.unpaired_candidate),
        )
        if names
    ]
    if lacking:
        raise TargetError(
            "GC124",
            f"{'; '.join(lacking)}. Name partners with --map OLD=NEW, or add --own-weights if the candidate has its "
            "values already.",
        )


def bind_inputs(subject: Subject, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return the inputs of the reference as the candidate takes them: as they are, else all by position.

    Args:
        subject: the reference.
        model: the candidate.
        args, kwargs: inputs of the reference.

    Raises:
        TypeError: the candidate takes other inputs.
    """
    signature = call_signature(model)
    if signature is None:
        return Inputs(args, kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        own = call_signature(subject.model)
        if own is None or not kwargs:
            raise
        bound = own.bind(*args, **kwargs).arguments
        if any(own.parameters[name].kind not in POSITIONAL for name in bound):
            raise
        signature.bind(*bound.values())
        return Inputs(tuple(bound.values()), {})
    return Inputs(args, kwargs)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CandidateProgram:
    """A candidate that runs on the inputs of a trial; its tensors have the reference's names.

    Attributes:
        paired: the candidate.
        reference: the model that it is compared with.
        input_mode: how the candidate takes float inputs.
        device: where the candidate runs; None: where the reference does.
        is_float64: whether it runs in float64.
        context: entered around each call and its backward.
    """

    paired: Paired
    reference: Subject
    input_mode: InputMode
    device: torch.device | None = None
    is_float64: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    name: str = "the candidate"
    quantities: frozenset[Quantity] = field(default=ALL_QUANTITIES)

    def subject_on(self, subject: Subject) -> Subject:
        """Return the candidate with the inputs, the loss and the seed of the reference."""
        args, kwargs = bind_inputs(self.reference, self.paired.subject.model, subject.args, subject.kwargs)
        if self.device is not None:
            args, kwargs = map_leaves(lambda _, leaf: _placed(leaf, self.device), (args, kwargs))
        return dataclasses.replace(self.paired.subject, args=args, kwargs=kwargs, loss=subject.loss, seed=subject.seed)

    def run(
        self, trial: ModelTrial, calls: int = CALLS, *, differentiable: frozenset[str] | None = None
    ) -> list[Outcome]:
        """Return the outcomes of some calls in a row; after one that raised there is no other."""
        own = self.subject_on(trial.instance.subject)
        _, found = run_copy(
            trial.name,
            own,
            self.subject_on(self.reference),
            promoted=self.is_float64,
            input_mode=self.input_mode,
            calls=calls,
            context=self.context,
            differentiable=trial.native[0].differentiable if differentiable is None else differentiable,
            with_numbers=True,
        )
        names = self._names_on(trial, own)
        device = _device_of(trial.native[0])
        return [each if each.error is not None else _renamed(each, names, device) for each in found]

    def _names_on(self, trial: ModelTrial, own: Subject) -> dict[str, str]:
        """Return the name in the reference of each tensor of the candidate; the first of those that are tied there."""
        subject = trial.instance.subject
        inputs = zip(
            input_names(own.model, own.args, own.kwargs),
            input_names(subject.model, subject.args, subject.kwargs),
            strict=True,
        )
        names = self.paired.names | {input_name(mine): input_name(name) for (mine, _), (name, _) in inputs}
        first = {name: leaf.name for leaf in trial.instance.leaves for name in (leaf.name, *leaf.tied)}
        return {mine: first.get(name, name) for mine, name in names.items()}


def _placed(leaf: Any, device: torch.device | None) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _device_of(outcome: Outcome) -> torch.device:
    return next((each.device for each in outcome.outputs.values()), torch.device("cpu"))


def _renamed(outcome: Outcome, names: Mapping[str, str], device: torch.device) -> Outcome:
    """Return an outcome under the reference's names; gradients of tensors that the reference ties are summed."""
    gradients: dict[str, Tensor | None] = {}
    for own, gradient in outcome.gradients.items():
        if (name := names.get(own)) is not None:
            placed, known = _placed(gradient, device), gradients.get(name)
            gradients[name] = placed if known is None else known if placed is None else known + placed
    state = {names[own]: value.to(device) for own, value in outcome.state.items() if own in names}
    outputs = {name: value.to(device) for name, value in outcome.outputs.items()}
    return Outcome(outputs, gradients, state, outcome.differentiable)


@dataclass(slots=True, eq=False, kw_only=True)
class CandidateComparison(ModelComparison):
    """A candidate beside the reference.

    Attributes:
        program: the candidate.
        float64_error: what the candidate raises in float64.
    """

    program: CandidateProgram
    reference_name: str = "the reference"
    float64_error: Exception | None = None

    def compare_natively(self) -> None:
        """Compare in the native dtype, on every trial and on random inputs."""
        trials = [*self.reference.trials, *self.reference.fresh_trials(RANDOM_INPUTS)]
        self.add(trials, keep_outcomes=True)
        self._drop_constant_buffers()
        if not self.raised:
            self.test_persistence()

    def _drop_constant_buffers(self) -> None:
        """Drop what the reference alone has and no call changes: a cache, or a constant."""
        first = named_tensors(module_of(self.reference.subject.model))[1]
        for name in first.keys() - set(self.program.paired.pairing.partners.values()):
            each = self.worst.get(("buffer", buffer_name(name)))
            if each is not None and each.reference is not None and torch.equal(each.reference, first[name]):
                del self.worst["buffer", buffer_name(name)]

    def compare_meaning(self) -> None:
        """Compare in float64 on every trial, and keep where each tensor differs most."""
        program = dataclasses.replace(self.program, is_float64=True, context=self.reference.promoting)
        for trial in self.reference.trials:
            if trial.float64 is None or trial.name in self.raised:
                continue
            calls = program.run(trial, len(trial.oracle), differentiable=trial.oracle[0].differentiable)
            if calls[-1].error is not None:
                self.float64_error = calls[-1].error
                return
            for number, call in enumerate(calls):
                self._keep_meaning(trial, number, call)

    def _keep_meaning(self, trial: ModelTrial, number: int, call: Outcome) -> None:
        oracle = trial.oracle[number]
        for key, each in self.worst.items():
            if key[0] not in trial.quantities:
                continue
            tensors = tensors_of(oracle, key[0]).values()
            neighbours = trial.compute_once((number, key[0]), partial(largest_scale, tensors))
            native = tensors_of(trial.native[number], key[0]).get(key[1])
            meaning = meaning_of(key, oracle, call, native, neighbours)
            if meaning is None:
                continue
            reference, candidate = (tensors_of(outcome, key[0])[key[1]] for outcome in (oracle, call))
            assert reference is not None and candidate is not None
            found = replace(each, meaning=meaning, float64=(reference, candidate))
            if found.means_another:
                found = replace(found, trial=trial, call=number + 1)
                self.differs_on.setdefault(key, set()).add(trial.name)
            if each.meaning is None or meaning > each.meaning:
                self.worst[key] = found

    def may_be_rounding(self, each: ModelDifference) -> bool:
        """Return whether random inputs may show that it is rounding; of a float64 tensor eager's own is not known."""
        is_widest = each.reference is not None and each.reference.dtype in (torch.float64, torch.complex128)
        return each.is_native_only or (is_widest and each.is_open and not each.means_another)

    def test_bias(self) -> None:
        """Look for an error within the budget that does not average out over random inputs, or is far above eager's."""
        trials = [each for each in self.reference.fresh_trials(RANDOM_INPUTS) if each.name in self.outcomes]
        if len(trials) < RANDOM_INPUTS or any(trial.float64 is None for trial in trials):
            return
        for key, each in self.worst.items():
            if not each.differs and each.rounding is None and each.reference is not None:
                self.worst[key] = self._with_bias(key, each, trials)

    def _with_bias(self, key: Key, each: ModelDifference, trials: Sequence[ModelTrial]) -> ModelDifference:
        assert each.reference is not None
        own, eagers = (
            [relative_error_of(key, trial.oracle[:1], calls(trial)[:1]) for trial in trials]
            for calls in (lambda trial: self.outcomes[trial.name], lambda trial: trial.native)
        )
        dtype = each.reference.dtype
        bias = bias_of(own, eagers, dtype)
        return replace(each, bias=bias, rounding=lost_precision(own, eagers, dtype) if bias is None else None)


def capture_submodule(paired: Paired, path: str, instance: Instance) -> Captured:
    """Return the candidate's module of one path, with the values of the reference's, as a form of it.

    Raises:
        CannotCapture: the candidate has no such module, or its parameters are not those of the reference's.
    """
    module = module_of(paired.subject.model)
    try:
        own = module.get_submodule(path) if module is not None else None
        if own is None:
            raise CannotCapture("the candidate is no module")
        found = pair(instance.subject, Subject(f"{paired.subject.target} {path}", own))
    except (AttributeError, TargetError) as error:
        raise CannotCapture(str(error)) from error
    copied, partners = found.subject.model, found.pairing.partners
    parameters, buffers = named_tensors(copied)
    renamed = {partners[name]: tensor for name, tensor in parameters.items() if name in partners}
    return Captured("candidate", copied, renamed, buffers, model=copied)
