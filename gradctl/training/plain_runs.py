"""The plain step in each precision, run once for all variants, with its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import Key
from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.names import Quantity
from gradctl.forms.draws import MeansOfDraws
from gradctl.numerics.agreement import scale_of
from gradctl.numerics.repetition import NOISE_SEEDS, is_cancelled, noise_of
from gradctl.subject.frames import first_line
from gradctl.subject.instance import native_dtype
from gradctl.subject.loading.triton_interpreter import kernels_in_float64
from gradctl.tracing.promotion import Promotion, default_dtype
from gradctl.training.recipe import TrainingRecipe
from gradctl.training.trainer import LOSS, StepRecord, Trainer

# The promotion mode runs each operator in float64; without it the copy is in float64, and casts inside are kept.
Precision = Literal["float64", "unpromoted", "native"]
QUANTITIES: tuple[Quantity, ...] = ("output", "gradient", "buffer")  # in the order in which a step computes them


@dataclass(frozen=True, slots=True, eq=False)
class PlainStep:
    """One plain step: what it computed, and how much of each tensor is rounding.

    Attributes:
        record: of the step.
        tensors: by quantity and name.
        scales: norm of each tensor.
        noise: norm of its change when weights, buffers and inputs move by one ULP before the first step.
        neighbours: the largest norm of tensors of its kind.
    """

    record: StepRecord
    tensors: dict[Key, Tensor | None]
    scales: dict[Key, float]
    noise: dict[Key, float]
    neighbours: dict[str, float]


class PlainRuns:
    """The plain step on all batches.

    Args:
        recipe: what is trained.
        steps: how many.
        alter: changes the plain step, if a variant is compared with another one.
        has_means: whether random numbers are replaced by their means.

    Attributes:
        loss: what messages call the loss; known after the first run.
        order: number of each parameter in the order in which backward computes the gradients.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        steps: int,
        alter: Callable[[Trainer], None] = lambda trainer: None,
        *,
        has_means: bool = False,
    ) -> None:
        self.recipe, self.steps, self.alter, self.has_means = recipe, steps, alter, has_means
        self.dtype = native_dtype(recipe.subject)
        self.loss = ""
        self.order: dict[str, int] = {}
        self._promotion = Promotion(self.dtype)
        self._runs: dict[tuple[Precision, str | None], list[PlainStep] | None] = {}

    @cached_property
    def with_means(self) -> PlainRuns:
        """The same steps, in which random numbers are replaced by their means."""
        recipe = replace(self.recipe, loading=None)  # another process draws its own random numbers
        return PlainRuns(recipe, self.steps, self.alter, has_means=True)

    @property
    def shortest(self) -> int:
        """The number of steps until a loss is not finite, in the precision in which this is the first."""
        return min((len(run) for run in self._runs.values() if run is not None), default=0)

    def fresh(self, number: int, steps: int) -> PlainRuns:
        """Return the same on other batches and seeds."""
        return PlainRuns(self.recipe.fresh(number), steps, self.alter, has_means=self.has_means)

    def trainer(self, precision: Precision, moved: tuple[int, float | None] | None = None) -> Trainer:
        """Return a new run, of the model's own step; ``moved`` as in ``TrainingRecipe.instance``."""
        promoted = precision != "native"
        instance = self.recipe.instance(promoted=promoted, moved=moved)
        # If the promotion has changed nothing in the plain step, it only costs time in that step on moved values.
        is_turned = precision == "float64" and (moved is None or self._promotion.turned)
        context = partial(self._context, precision, is_turned=is_turned)
        return Trainer(self.recipe, instance, context, is_float64=promoted)

    def _context(self, precision: Precision, *, is_turned: bool) -> AbstractContextManager[Any]:
        """Return the context of a step."""
        stack = ExitStack()
        if precision != "native":
            # Of a compiled optimizer, too: it computes with the number of its step as a tensor of this dtype.
            stack.enter_context(default_dtype(torch.float64))
        if is_turned:
            stack.enter_context(self._promotion)
        if precision == "float64":
            stack.enter_context(kernels_in_float64())
        if self.has_means:
            stack.enter_context(MeansOfDraws())
        return stack

    def run(self, precision: Precision, rounding: str | None = None) -> list[PlainStep] | None:
        """Return the plain steps in a precision; None if the model does not run in float64.

        Args:
            precision: of the run.
            rounding: name of a narrower dtype, whose machine epsilon the noise is that of.

        Raises:
            TargetError: GC111 if the model raises natively, GC144 if the optimizer does.
        """
        key = precision, rounding
        if key not in self._runs:
            self._runs[key] = self._run(precision, rounding)
        return self._runs[key]

    def _run(self, precision: Precision, rounding: str | None) -> list[PlainStep] | None:
        try:
            records = self._records(precision)
        except TargetError:
            raise
        except Exception as error:  # a model may raise anything where it is in float64
            if precision == "native" or is_out_of_memory(error):
                raise
            return None
        part = None if rounding is None else torch.finfo(getattr(torch, rounding)).eps
        noise: list[dict[Key, float]] = [{} for _ in records]
        for seed in NOISE_SEEDS:
            for number, moved in enumerate(self._altered(precision, (seed, part)).run(len(records))):
                _add_noise(noise[number], records[number], moved)
        return [_plain_step(record, each) for record, each in zip(records, noise, strict=True)]

    def _records(self, precision: Precision) -> list[StepRecord]:
        """Return the records of the plain steps; natively, drawn inputs without a finite loss are not used."""
        while True:
            trainer = self._altered(precision)
            self._promotion.turned = False
            if not self.order:
                _record_order(trainer, self.order)
            try:
                records = [record.kept() for record in self._until_unusable(trainer)]
            except Exception as error:
                number = trainer.number
                if precision != "native" or not self._replace_batch(number):
                    if number == 0 or isinstance(error, TargetError) or is_out_of_memory(error):
                        raise
                    said = f"{self.recipe.subject.target} raises at step {number + 1}: {first_line(error)}."
                    raise TargetError("GC111", said) from error
                continue
            self.loss = self.recipe.describe_loss(trainer.loss_name)
            # The batches are those of the native run: of other runs, the steps before a loss that is not finite count.
            if len(records) == self.steps or precision != "native" or not self._replace_batch(len(records)):
                return records

    def _until_unusable(self, trainer: Trainer) -> Iterator[StepRecord]:
        for record in trainer.run(self.steps):
            loss = record.outcome.outputs.get(LOSS)
            if loss is not None and not math.isfinite(float(loss)):
                return
            yield record

    def _replace_batch(self, number: int) -> bool:
        """Let a step run on the example in place of drawn inputs; return False if it does so already."""
        is_new = number != 0 and number not in self.recipe.on_example
        self.recipe.on_example.add(number)
        return is_new

    def _altered(self, precision: Precision, moved: tuple[int, float | None] | None = None) -> Trainer:
        trainer = self.trainer(precision, moved)
        self.alter(trainer)
        return trainer


def _record_order(trainer: Trainer, order: dict[str, int]) -> None:
    """Let the run number its parameters as their gradients are computed."""
    for name, tensors in trainer.parameters.items():
        for tensor in tensors:
            hook = partial(_number, order, name)
            tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _number(order: dict[str, int], name: str, _: Tensor) -> None:
    order.setdefault(name, len(order))


def _plain_step(record: StepRecord, noise: dict[Key, float]) -> PlainStep:
    scales: dict[Key, float] = {}
    neighbours: dict[str, float] = {}
    tensors = named(record)
    for key, tensor in tensors.items():
        scale = record.loss_scale if key == ("output", LOSS) else scale_of(tensor) if tensor is not None else 0.0
        scales[key] = scale
        neighbours[kind_of(key)] = max(neighbours.get(kind_of(key), 0.0), scale)
    return PlainStep(record, tensors, scales, noise, neighbours)


def _add_noise(noise: dict[Key, float], record: StepRecord, moved: StepRecord) -> None:
    others = named(moved)
    for key, tensor in named(record).items():
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            noise[key] = max(noise.get(key, 0.0), noise_of(tensor, [others.get(key)]))


def named(record: StepRecord) -> dict[Key, Tensor | None]:
    """Return the tensors of a step by quantity and name, in the order in which it computes them."""
    outcome = record.outcome
    return {(quantity, name): each for quantity in QUANTITIES for name, each in tensors_of(outcome, quantity).items()}


def kind_of(key: Key) -> str:
    """Return the kind of a tensor, whose largest norm a tensor that is zero by cancellation is judged by."""
    quantity, name = key
    return name.partition(".")[0] if name.startswith("optimizer:") else f"{quantity} {name.partition(':')[0]}"


def is_zero_by_cancellation(step: PlainStep, key: Key) -> bool:
    """Return whether a tensor of a run is zero by cancellation, or depends on such a tensor only."""
    tensor = step.tensors.get(key)
    is_float = tensor is not None and (tensor.is_floating_point() or tensor.is_complex())
    return is_float and tensor is not None and is_cancelled(step.scales[key], step.noise.get(key, 0.0), tensor.dtype)
