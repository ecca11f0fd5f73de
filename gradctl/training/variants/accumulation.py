"""``accumulate:K``: the gradients of K micro-batches added up, against those of the batch.

The losses of micro-batches are weighted by their number of samples (``loss / K`` if they are equal), as most training
loops do it; a loss that is a sum over the samples is not weighted. So the row says whether such a loop computes the
step of the batch. It does not if the loss is a mean over tokens (GC435), or if a layer computes statistics over the
batch (GC436). Dropout masks are those of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.example import input_names
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.state import State
from gradctl.training.micro_batches import MicroBatch, batch_size, labels_of, split, tokens
from gradctl.training.row_replay import BatchRecording, CannotReplay, Replay
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variants.mixing import difference, mixing_modules
from gradctl.training.variants.table import CannotApply

# The loss of a batch, to know whether it is a mean or a sum over the samples: they differ by a factor of 2 or more.
_SAME_LOSS = 1e-3
Weight = Callable[[MicroBatch, "Batch"], float]


class Batch:
    """A batch of a step, its micro-batches, and the random numbers of its forward.

    Args:
        trainer: what runs.
        count: of micro-batches.
        args, kwargs: inputs of the model.
    """

    def __init__(self, trainer: Trainer, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.trainer, self.args, self.kwargs = trainer, args, kwargs
        self.size = batch_size(args, kwargs)
        self.parts = split(args, kwargs, count)
        self.recording: BatchRecording | None = None

    @property
    def labels(self) -> Tensor | None:
        """The labels among the inputs."""
        return labels_of(input_names(self.trainer.recipe.subject.model, self.args, self.kwargs))

    def record(self, context: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
        """Return the outputs of the whole batch, and keep its random numbers, if it draws any; all state is put back.

        Autograd records it: a model may differentiate in its forward. ``context`` is entered around it.
        """
        state, recording = State([self.trainer.instance.model]), BatchRecording()
        with preserve_generators():
            seed_generators(self.trainer.recipe.subject.seed + self.trainer.number)
            before = torch.get_rng_state()
            with recording, context or nullcontext():
                outputs = self.trainer.outputs(*self.args, **self.kwargs)
            is_random = not torch.equal(before, torch.get_rng_state())
        state.restore()
        self.recording = recording if is_random else None
        return {name: output.detach() for name, output in outputs.items()}

    def replay(self, part: MicroBatch) -> AbstractContextManager[Any]:
        """Return the context of the forward of a micro-batch."""
        return Replay(self.recording, part.rows, self.size) if self.recording is not None else nullcontext()

    def outputs(self) -> Iterator[tuple[MicroBatch, dict[str, Tensor]]]:
        """Yield micro-batches with their outputs.

        Raises:
            CannotApply: their random numbers cannot be those of the batch.
        """
        for part in self.parts:
            try:
                with self.replay(part):
                    outputs = self.trainer.outputs(*part.args, **part.kwargs)
            except CannotReplay as error:
                raise CannotApply(f"{error}: micro-batches would have other random numbers.") from error
            yield part, outputs


def by_samples(part: MicroBatch, batch: Batch) -> float:
    """Return the part of the samples that a micro-batch has."""
    return len(part) / batch.size


def by_tokens(part: MicroBatch, batch: Batch, *, shifted: bool) -> float:
    """Return the part of the labels that a micro-batch has; of all samples if there are none."""
    labels = batch.labels
    if labels is None or labels.shape[0] != batch.size:
        return by_samples(part, batch)
    return tokens(labels[part.rows], shifted=shifted) / max(tokens(labels, shifted=shifted), 1)


def alter(trainer: Trainer, argument: str | None) -> None:
    """Run micro-batches, and step the optimizer after the last."""
    accumulate(trainer, argument, by_samples)


def accumulate(trainer: Trainer, argument: str | None, weight: Weight) -> None:
    """As ``alter``, with losses weighted by ``weight(micro-batch, batch)``.

    Raises:
        CannotApply: the batch cannot be split, or its rows affect each other.
    """
    count = count_of(argument)
    is_sum = _is_sum(trainer, count)

    def step(*args: Any, **kwargs: Any) -> Tensor:
        trainer.optimizer.zero_grad()
        batch = Batch(trainer, count, args, kwargs)
        whole = batch.record()
        parts, losses = [], []
        for part, outputs in batch.outputs():
            loss = trainer.loss_of(outputs, part.rows)
            losses.append(loss if is_sum else loss * weight(part, batch))
            trainer.backward(losses[-1])
            parts.append({name: output.detach() for name, output in outputs.items()})
        trainer.update()
        _ensure_rows_are_independent(trainer, batch, whole, parts)
        return torch.stack([each.detach() for each in losses]).sum()

    trainer.step = step


def count_of(argument: str | None) -> int:
    """Return the number of micro-batches.

    Raises:
        TargetError: GC145 if it is not a number from 2.
    """
    if argument is None or not argument.isdigit() or int(argument) < 2:
        raise TargetError(
            "GC145", f"accumulate takes the number of micro-batches, at least 2 (accumulate:2), not {argument!r}."
        )
    return int(argument)


def _is_sum(trainer: Trainer, count: int) -> bool:
    """Return whether the loss is a sum over the samples, from the losses of the first batch and its parts.

    Raises:
        CannotApply: the batch cannot be split.
    """
    instance = trainer.instance
    args, kwargs = trainer.recipe.batch(instance, 0)
    batch = Batch(trainer, count, args, kwargs)
    if batch.size < count:
        raise CannotApply(f"the batch has {batch.size} samples (axis 0 of the first input), fewer than {count}.")
    state = State([instance.model])
    try:
        with trainer.context():
            whole = batch.record()
            parts = list(batch.outputs())
    except CannotApply:
        raise
    except Exception as error:  # of the model, on a size that it does not take
        if is_out_of_memory(error):
            raise
        raise CannotApply(f"the model raises on {len(batch.parts[0])} samples: {first_line(error)}.") from error
    state.restore()
    name = trainer.recipe.loss_name(whole)
    if name is None:
        return _is_by_rows(whole, batch.size)
    loss, losses = float(whole[name]), [float(outputs[name]) for _, outputs in parts]
    mean = sum(len(part) / batch.size * each for (part, _), each in zip(parts, losses, strict=True))
    return abs(sum(losses) - loss) < _SAME_LOSS * abs(loss) < abs(mean - loss)


def _is_by_rows(outputs: dict[str, Tensor], size: int) -> bool:
    """Return True: the sum of all outputs with random weights is a sum over the rows of the batch.

    Raises:
        CannotApply: an output has no such rows.
    """
    for name, output in outputs.items():
        if output.is_floating_point() and (not output.ndim or output.shape[0] != size):
            raise CannotApply(f"{name} has the shape {list(output.shape)}, not a row for each of {size} samples.")
    return True


def _ensure_rows_are_independent(
    trainer: Trainer, batch: Batch, whole: dict[str, Tensor], parts: list[dict[str, Tensor]]
) -> None:
    """Raise CannotApply if a row of an output depends on other rows, apart from the statistics of a layer in training.

    Axis 0 may not be the batch (but the time steps of a recurrent network); or the model is defined on batches.
    """
    mixed = [name for name, each in whole.items() if difference(each, [part.get(name) for part in parts], batch.size)]
    if not mixed or statistics_modules(trainer):
        return
    modules = mixing_modules(trainer, batch)
    where = next((f", in {name or 'the model'} ({type(each).__name__})" for name, each in modules.items()), "")
    raise CannotApply(f"the rows of axis 0 affect each other{where}: {mixed[0]} changes if they are split.")


def statistics_modules(trainer: Trainer) -> dict[str, nn.Module]:
    """Return the modules, by name, that compute statistics over the batch: BatchNorm in training mode."""
    named = trainer.module.named_modules() if trainer.module is not None else ()
    return {name: each for name, each in named if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training}


def experiments(argument: str | None) -> Experiments:
    """Yield the tests of GC435 and GC436."""
    for shifted in (False, True):
        tokens_said = "tokens of the labels" + (", shifted by one as in a language model" if shifted else "")
        agrees = yield Experiment(
            "GC435",
            lambda said=tokens_said: f"the loss is a mean over tokens; weighted by {said}, the micro-batches agree",  # type: ignore[misc]
            "Sum the losses over tokens, and divide by the number of tokens in all micro-batches.",
            partial(accumulate, weight=partial(by_tokens, shifted=shifted)),
        )
        if agrees:
            return
    names: dict[str, None] = {}

    def still(trainer: Trainer, _: str | None) -> None:
        for name, module in statistics_modules(trainer).items():
            names[f"{name or 'the model'} ({type(module).__name__})"] = None
            module.eval()

    def still_accumulating(trainer: Trainer, text: str | None) -> None:
        still(trainer, text)
        alter(trainer, text)

    yield Experiment(
        "GC436",
        lambda: f"{', '.join(list(names)[:3])} computes statistics over the batch; in evaluation mode, they agree",
        "Use a layer without statistics over the batch (GroupNorm, LayerNorm), or accept that micro-batches differ.",
        still_accumulating,
        still,
    )
