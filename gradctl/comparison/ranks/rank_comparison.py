"""A model on many ranks beside the same model in one process, in float64, on the whole batch.

Both compute the same sums in another order, so that they agree to rounding: the tolerance is that of two runs of one
function (``numerics/repetition.py``). Random numbers, which are others in each share of a batch, are replaced by their
means in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key, ModelDifference, TensorDifference, is_identical
from gradctl.comparison.model_comparison import ModelComparison
from gradctl.comparison.program import cotangents_of, run_calls
from gradctl.comparison.ranks.share_by_share import ShareByShare
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import ALL_QUANTITIES, ModelTrial
from gradctl.core.findings import TensorResult
from gradctl.core.names import Quantity, input_name
from gradctl.forms import eager
from gradctl.forms.draws import MeansOfDraws
from gradctl.forms.form import CannotCapture, Outcome
from gradctl.forms.ranks.processes import RankFailed
from gradctl.forms.ranks.rank_form import RankForm
from gradctl.forms.ranks.rank_program import RankProgram, RankRecord
from gradctl.forms.ranks.ranks_run import SECONDS, RanksRun
from gradctl.forms.ranks.sharing import Shard, Shares, batch_size, shares_of
from gradctl.numerics.agreement import norm_of_difference, scale_of
from gradctl.numerics.repetition import NOISE_SEEDS, is_cancelled, noise_of, repetition_tolerance
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.state import State
from gradctl.subject.subject import Subject

# The trials that are compared, each with its number of calls: in the second, the state of the first is seen.
_CALLS = {"example": 2, "seed": 1}
# Of a model that treats each sample alone, shares differ from the whole by rounding in float64: less than this.
_MIXES = 1e-9
# Of a tensor that is zero by cancellation, rounding explains more than this part of its norm.
_CANCELLED = 1e-4
# Another input must be clearly worse than the example to be named in its place.
_TIMES_WORSE = 2.0
_SEED_BESIDE = 7919  # added to the seed, to see whether random numbers affect the result


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What one process computes in one call.

    Attributes:
        trial: the inputs.
        number: of the call, from 0.
        outcome: in float64.
        moved: the same with weights and inputs moved by one ULP, which shows the noise.
    """

    trial: ModelTrial
    number: int
    outcome: Outcome
    moved: Sequence[Outcome]

    def tolerance(self, key: Key, like: Tensor) -> float:
        """Return the largest norm of the difference between a tensor and that of a right program."""
        tensors = tensors_of(self.outcome, key[0])
        neighbours = max((scale_of(each) for each in tensors.values() if each is not None), default=0.0)
        scale, noise = scale_of(like), noise_of(like, [tensors_of(each, key[0]).get(key[1]) for each in self.moved])
        if is_cancelled(scale, noise, like.dtype):
            scale = max(scale, neighbours)
        rest = 0.0 if noise else torch.finfo(like.dtype).eps * neighbours  # of a cancellation in another order
        return repetition_tolerance(scale, noise, like.dtype) + rest


@dataclass(frozen=True, slots=True, eq=False)
class Disagreement:
    """A tensor of which the ranks have copies that differ.

    Attributes:
        key: quantity and name.
        ranks: the two ranks.
        names: the qualified names of the copies, which differ if the parameter is tied.
        error: norm of the difference, relative to the larger of the two.
    """

    key: Key
    ranks: tuple[int, int]
    names: tuple[str, str]
    error: float


@dataclass(slots=True, eq=False)
class RanksProgram:
    """The model on many ranks, started anew for each trial.

    Attributes:
        form: how the model is arranged.
        input_mode: how the model takes float inputs.
        context: of the float64 run in one process.
        has_means: whether random numbers are replaced by their means.
        seconds: the time limit of each answer of the ranks.
        alter: changes what each rank does, to test a cause.
        records: of each rank, by trial and call.
        leaves: of the last run, with the copies of its gradients by rank and name, by call.
        failure: what a rank did instead of answering.
    """

    form: RankForm
    reference: Reference
    has_means: bool = False
    seconds: float = SECONDS
    alter: Callable[[RankProgram], None] | None = None
    quantities: frozenset[Quantity] = field(default=ALL_QUANTITIES)
    records: dict[str, list[list[RankRecord]]] = field(default_factory=dict)
    copies: list[dict[str, dict[tuple[int, str], Tensor]]] = field(default_factory=list)
    buffers: list[dict[str, list[Tensor | None]]] = field(default_factory=list)
    failure: RankFailed | None = None

    @property
    def name(self) -> str:
        """The name of the form."""
        return f"{self.form.kind}:{self.form.world}"

    def run(self, trial: ModelTrial, calls: int = 1, *, differentiable: frozenset[str] | None = None) -> list[Outcome]:
        """Return the outcomes of some calls in a row, with the gradients of the whole batch.

        Raises:
            CannotCapture: the model cannot be arranged in this way.
            RankFailed: a rank raises, dies or does not answer.
        """
        subject = trial.instance.subject
        instance = Instance(subject, promoted=True, input_mode=self.reference.input_mode, keep_hooks=True)
        instance.restore()
        asked = trial.native[0].differentiable if differentiable is None else differentiable
        self.copies, self.buffers, found = [], [], []
        with RanksRun(
            self.form.kind,
            self.form.world,
            instance,
            promotes=True,
            has_means=self.has_means,
            context=self.reference.promoting,
            seconds=self.seconds,
            alter=self.alter,
        ) as run:
            self.records[trial.name] = run.records
            for _ in range(calls):
                outputs = run.forward()
                cotangents = cotangents_of(outputs, subject.seed)
                gradients = run.backward({name: each for name, each in cotangents.items() if name in asked})
                state = {name: first for name, each in run.buffers.items() if (first := _first(each)) is not None}
                found.append(Outcome(outputs, gradients, state, run.requiring))
                self.copies.append({leaf.name: run.copies(leaf) for leaf in instance.leaves})
                self.buffers.append(run.buffers)
        return found


@dataclass(slots=True, eq=False, kw_only=True)
class RankComparison(ModelComparison):
    """The ranks beside one process.

    Attributes:
        program: the ranks.
        shares: which rank has which share of the inputs.
        shard: returns the share of a rank.
        expected: what one process computes, by trial and call.
        disagreements: copies of one tensor that differ between ranks, the first of each tensor.
        partial_inputs: names of inputs of whose gradients the ranks have parts that sum to the whole, where no training
            needs them.
        has_means: whether random numbers are replaced by their means.
        is_by_share: whether one process runs share after share, because the model computes another function there.
        skipped: trials that were not compared, with the reason.
    """

    program: RanksProgram
    shares: Shares
    shard: Shard
    reference_name: str = "one process"
    expected: dict[str, list[Expected]] = field(default_factory=dict)
    disagreements: dict[Key, Disagreement] = field(default_factory=dict)
    partial_inputs: list[str] = field(default_factory=list)
    has_means: bool = False
    is_by_share: bool = False
    skipped: list[str] = field(default_factory=list)

    def compare(self) -> None:
        """Compare on the example and on another input.

        Raises:
            CannotCapture: the model cannot be compared, or not be arranged in this way.
            RankFailed: a rank raises, dies or does not answer.
        """
        subject = self.reference.subject
        self.has_means = self.program.has_means = self._draws(subject)
        for trial in self.reference.trials:
            calls = min(_CALLS.get(trial.name, 0), len(trial.native))
            if not calls:
                continue
            expected = self._expected(trial, calls)
            if expected is None:
                self.skipped.append(f"{trial.name} (one process does not run in float64)")
                continue
            self.expected[trial.name] = expected
            found = self._run_ranks(trial, calls)
            if self._outputs_differ(expected, found) and self._mixes_samples(trial):
                expected = self._expected(trial, calls, is_by_share=True) or expected
                self.expected[trial.name], self.is_by_share = expected, True
            for each, call in zip(expected, found, strict=True):
                self._add(call, each)
            self.tried.append(trial.name)
        if not self.tried:
            raise CannotCapture("the model does not run in float64, in which ranks are compared with one process.")

    def _run_ranks(self, trial: ModelTrial, calls: int) -> list[Outcome]:
        """Return the outcomes of the ranks.

        Raises:
            CannotCapture: a rank raises what one process raises on a share, too: the first axis is not the batch.
        """
        try:
            return self.program.run(trial, calls)
        except RankFailed as failure:
            alone = self.run_whole(trial, 1, is_by_share=True)[0].error if self.shares.are_of_batch else None
            if failure.kind != "raised" or alone is None:
                raise
            raise CannotCapture(
                f"one process raises on a share of the first axis of the inputs, too: {first_line(alone)}. Write "
                "shard_inputs(inputs, rank, world) beside the target for ranks:N."
            ) from failure

    def without_cancelled(self, rows: Sequence[TensorResult]) -> list[TensorResult]:
        """Return the rows, those of tensors that are zero by cancellation counted apart: their error is rounding."""
        return [
            msgspec.structs.replace(each, verdict="too-small")
            if each.verdict == "same" and isinstance(each.budget, float) and each.budget > _CANCELLED
            else each
            for each in rows
        ]

    @property
    def example(self) -> ModelTrial:
        """The first trial that was compared."""
        return next(each for each in self.reference.trials if each.name in self.expected)

    @property
    def records(self) -> list[RankRecord]:
        """What each rank computed in the first call of the example."""
        return self.program.records[self.example.name][0]

    def altered(self, alter: Callable[[RankProgram], None], *, has_means: bool | None = None) -> RankComparison:
        """Return the comparison of ranks that do something else, on the first call of the example alone.

        Args:
            alter: called in each rank.
            has_means: whether random numbers are replaced by their means; None: as here.

        Raises:
            CannotCapture, RankFailed: as ``compare``.
        """
        trial, means = self.example, self.has_means if has_means is None else has_means
        program = replace(self.program, alter=alter, has_means=means, records={}, copies=[], buffers=[])
        none: dict[str, Any] = {"tried": [], "raised": {}, "worst": {}, "differs_on": {}, "disagreements": {}}
        other = replace(self, candidate=program, program=program, partial_inputs=[], **none)
        (call,) = program.run(trial, 1)
        other._add(call, self.expected[trial.name][0])
        return other

    def context(self) -> AbstractContextManager[Any]:
        """Return the context of a run in one process."""
        stack = ExitStack()
        stack.enter_context(self.reference.promoting())
        if self.has_means:
            stack.enter_context(MeansOfDraws())
        return stack

    def run_whole(
        self, trial: ModelTrial, calls: int, *, moved_by: int | None = None, seed: int = 0, is_by_share: bool = False
    ) -> list[Outcome]:
        """Return the outcomes of calls in a row in one process, in float64.

        Args:
            trial: the inputs.
            calls: how many.
            moved_by: a seed: weights, buffers and inputs are moved by one ULP, which shows the noise.
            seed: added to the seed of the random numbers.
            is_by_share: whether it runs share after share.
        """
        own = trial.instance.subject
        return self._run(replace(own, seed=own.seed + seed), calls, moved_by=moved_by, is_by_share=is_by_share)

    def _run(
        self, subject: Subject, calls: int, *, moved_by: int | None = None, is_by_share: bool = False
    ) -> list[Outcome]:
        instance = Instance(subject, promoted=True, input_mode=self.reference.input_mode, keep_hooks=True)
        if moved_by is not None:
            instance.move_by_ulp(moved_by)
        captured = eager.capture(instance)
        if is_by_share:
            captured = replace(captured, call=ShareByShare(instance, self.shares, self.shard))
        return run_calls(captured, instance, State([]), calls=calls, context=self.context)

    def _outputs_differ(self, expected: Sequence[Expected], found: Sequence[Outcome]) -> bool:
        pairs = zip(expected, found, strict=True)
        return any(
            self._difference(("output", name), own, call.outputs.get(name), each).exceeds
            for each, call in pairs
            for name, own in each.outcome.outputs.items()
        )

    def _mixes_samples(self, trial: ModelTrial) -> bool:
        """Return whether the model computes another function on shares of the batch, of which each sample is a part.

        A loss is no such output: if that of the shares is not the mean, the ranks compute another gradient by mistake.
        """
        if len(self.shares.groups) == 1 or not self.shares.are_of_batch:
            return False
        subject = replace(trial.instance.subject, loss=None)
        (whole,), (parts,) = (self._run(subject, 1, is_by_share=each) for each in (False, True))
        size = batch_size(subject)
        outputs = {name: each for name, each in whole.outputs.items() if each.dim() and len(each) == size}
        return parts.error is None and any(
            not is_identical(each, found) and _distance(each, found) > _MIXES * scale_of(each)
            for name, each in outputs.items()
            if (found := parts.outputs.get(name)) is not None and found.shape == each.shape
        )

    def _draws(self, subject: Subject) -> bool:
        """Return whether the result depends on random numbers.

        Raises:
            CannotCapture: also if they are replaced by their means.
        """
        trial = self.reference.trials[0]
        instance = Instance(subject, promoted=True, input_mode=self.reference.input_mode, keep_hooks=True)
        with preserve_generators(), self.context():
            instance.restore()
            args, kwargs = instance.inputs()
            with torch.enable_grad():
                torch.default_generator.manual_seed(subject.seed)
                before = torch.get_rng_state()
                instance.call_as_seeded(instance.model, args, kwargs)
                draws = not torch.equal(before, torch.get_rng_state())
        if not draws:
            return False
        self.has_means = True
        ones, others = (self.run_whole(trial, 1, seed=seed)[0] for seed in (0, _SEED_BESIDE))
        if ones.error is None and others.error is None and not _are_alike(ones.outputs, others.outputs):
            raise CannotCapture(
                "the model draws random numbers that have no mean to replace them, and ranks draw others than one "
                "process. Use --eval, or draw them outside of the model."
            )
        return True

    def _expected(self, trial: ModelTrial, calls: int, *, is_by_share: bool = False) -> list[Expected] | None:
        moved = (None, *NOISE_SEEDS)
        runs = [self.run_whole(trial, calls, moved_by=seed, is_by_share=is_by_share) for seed in moved]
        if any(run[-1].error is not None for run in runs):
            return None
        calls_in_runs = enumerate(zip(*runs, strict=True))
        return [Expected(trial, number, own, moved) for number, (own, *moved) in calls_in_runs]

    def _add(self, call: Outcome, expected: Expected) -> None:
        """Compare one call; of copies that differ, the one farthest from the reference is the candidate."""
        for quantity in ("output", "gradient", "buffer"):
            own, found = tensors_of(expected.outcome, quantity), tensors_of(call, quantity)
            own = {name: each for name, each in own.items() if quantity != "buffer" or name.startswith("buffer:")}
            for name in sorted(own.keys() | found.keys()):
                key: Key = (quantity, name)
                if self._is_partial_sum(key, own.get(name), found.get(name), expected):
                    self.partial_inputs += [name] if name not in self.partial_inputs else []
                    continue
                candidate = self._farthest(key, own.get(name), found.get(name), expected)
                self._keep(key, self._difference(key, own.get(name), candidate, expected))

    def _is_partial_sum(self, key: Key, own: Tensor | None, found: Tensor | None, expected: Expected) -> bool:
        """Return whether ranks with one share have parts of the gradient of an input, in place of the whole.

        No collective has to sum them if nothing before the model is trained: if the tensor of the example requires no
        gradient.
        """
        records = self.program.records[expected.trial.name][expected.number]
        parts = [each for record in records if (each := record.input_gradients.get(key[1])) is not None]
        if key[0] != "gradient" or own is None or not parts:
            return False
        if not self._difference(key, own, found, expected).exceeds:
            return False
        subject = self.reference.subject
        given = {input_name(name): each for name, each in input_names(subject.model, subject.args, subject.kwargs)}
        if key[1] not in given or given[key[1]].requires_grad:
            return False
        whole = torch.stack(parts).sum(0) / (1 if self.shares.is_sum else len(self.shares.groups))
        return not self._difference(key, own, whole, expected).exceeds

    def _farthest(self, key: Key, own: Tensor | None, found: Tensor | None, expected: Expected) -> Tensor | None:
        quantity, name = key
        if quantity == "output" or own is None:
            return found
        copies = self.program.copies[expected.number].get(name, {}) if quantity == "gradient" else {}
        if quantity == "buffer" and not self.is_by_share:
            parts = self.program.buffers[expected.number].get(name, [])
            copies = {
                (rank, name): each for rank, each in enumerate(parts) if each is not None and each.shape == own.shape
            }
        for one, other in zip(copies, list(copies)[1:], strict=False):
            distance = _distance(copies[one], copies[other])
            if distance > self._tolerance(key, own, expected) and quantity == "gradient":
                larger = max(scale_of(copies[one]), scale_of(copies[other]))
                error = distance / larger if larger else math.inf
                self.disagreements.setdefault(key, Disagreement(key, (one[0], other[0]), (one[1], other[1]), error))
        return max(copies.values(), key=lambda each: _distance(own, each), default=found) if copies else found

    def _tolerance(self, key: Key, own: Tensor, expected: Expected) -> float:
        return expected.tolerance(key, own) if own.is_floating_point() or own.is_complex() else 0.0

    def _difference(self, key: Key, own: Tensor | None, found: Tensor | None, expected: Expected) -> ModelDifference:
        difference = partial(TensorDifference, key[1], expected.trial, expected.number + 1)
        if own is None or found is None:
            shown = own if own is not None else found
            # DDP and FSDP may leave zeros where one process leaves nothing, which no optimizer distinguishes much.
            is_same = shown is None or (key[0] == "gradient" and not bool(shown.any()))
            if is_same:
                return difference(shown, shown, 0.0, 0.0)
            return difference(own, found, math.inf, 0.0)
        if own.shape != found.shape:
            return difference(own, found, math.inf, 0.0)
        found = found.to(own.dtype)
        scale = scale_of(own) or 1.0
        error, budget = _distance(own, found) / scale, self._tolerance(key, own, expected) / scale
        return difference(own, found, error, budget)


def rank_comparison(reference: Reference, form: RankForm, *, seconds: float = SECONDS) -> RankComparison:
    """Return the comparison of a form with one process, before its first run.

    Raises:
        CannotCapture: the inputs cannot be shared between the ranks.
    """
    shares, shard = shares_of(form.kind, form.world, reference.subject)
    program = RanksProgram(form, reference, seconds=seconds)
    return RankComparison(
        program, reference=reference, program=program, shares=shares, shard=shard, times_worse=_TIMES_WORSE
    )


def _first(parts: Sequence[Tensor | None]) -> Tensor | None:
    return next((each for each in parts if each is not None), None)


def _distance(one: Tensor, other: Tensor) -> float:
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, other) else math.inf
    return norm_of_difference(other, one)


def _are_alike(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(each, others[name]) for name, each in ones.items())
