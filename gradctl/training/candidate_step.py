"""Another implementation trained like the reference: its step is one more variant, with the reference's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradctl.comparison.candidates.candidate import Paired, bind_inputs, pair
from gradctl.core.errors import TargetError
from gradctl.subject.instance import Instance
from gradctl.subject.subject import Subject
from gradctl.training.chosen_variants import ChosenVariant
from gradctl.training.recipe import trained
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import Variant

NAME = "candidate"


def candidate_variant(
    reference: Subject, candidate: Subject, renamed: Sequence[tuple[str, str]] = (), *, own_values: bool = False
) -> ChosenVariant:
    """Return the plain step of another model, which has the reference's values, as a variant.

    Args:
        reference, candidate: not changed.
        renamed, own_values: as ``pair`` takes them.

    Raises:
        TargetError: GC123 if the candidate does not take the inputs of the reference; GC124 for its parameters.
    """
    paired = pair(reference, candidate, renamed, own_values=own_values)
    try:
        args, kwargs = bind_inputs(reference, candidate.model, reference.args, reference.kwargs)
    except TypeError as error:
        said = f"{candidate.target} does not take the inputs of {reference.target}: {error}."
        raise TargetError("GC123", said) from error
    subject = replace(paired.subject, args=args, kwargs=kwargs, loss=None, seed=reference.seed)

    def alter(trainer: Trainer) -> None:
        _train(trainer, reference, subject, paired)

    return ChosenVariant(NAME, Variant(""), change=alter)


def _train(trainer: Trainer, reference: Subject, candidate: Subject, paired: Paired) -> None:
    """Let a run train a copy of the candidate, and record it under the reference's names."""
    mode = trainer.recipe.input_mode
    instance = Instance(candidate, promoted=trainer.is_float64, input_mode=mode, keep_hooks=True)
    first = {name: leaf.name for leaf in trainer.instance.leaves for name in (leaf.name, *leaf.tied)}
    names = {own: first.get(name, name) for own, name in paired.names.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        own = bind_inputs(reference, candidate.model, args, kwargs)
        return instance.model(*own.args, **own.kwargs)

    trainer.call, trainer.model = call, instance.model
    trainer.parameters = {names.get(name, name): tensors for name, tensors in trained(instance).items()}
    trainer.buffer_names = names
