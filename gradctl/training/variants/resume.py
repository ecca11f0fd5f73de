"""``resume``: after half of the steps, all state is saved and loaded into a new process, which continues.

Saved are the ``state_dict`` of the model, the optimizer and the scheduler, and the state of torch's random generator,
with ``torch.save``; they are read with ``weights_only=True``. What a state_dict does not have is lost, as after a
restart: attributes that are no parameters or buffers, buffers that are not persistent, attributes of an optimizer. A
model that was passed to the Python API cannot be loaded by another process: a new copy of it continues in this one.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradctl.core.errors import is_out_of_memory
from gradctl.subject.frames import first_line
from gradctl.training.hidden_state import attribute_names, frozen, is_same
from gradctl.training.recipe import trained, unique
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply

# Attributes of optimizers and schedulers that a state_dict has, or that refer to the other.
_SAVED = ("state", "param_groups", "defaults", "optimizer")
# Of the names that are tried one by one, at most.
_MOST_NAMES = 16
# What is done with the old run and the new one, after the new one has loaded its state.
Carry = Callable[[Trainer, "Old"], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Old:
    """The run that was interrupted."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any


def alter(trainer: Trainer, argument: str | None) -> None:
    """Resume in a new process before the step in the middle; in a new copy if no process can load the target."""
    loading = trainer.recipe.loading
    if loading is None:
        resume_and_carry(trainer, lambda *_: None)
        return

    def begin() -> None:
        from gradctl.training.variants.resumed_process import continue_in_process  # which imports this file

        trainer.made_elsewhere = continue_in_process(trainer, loading, _saved(trainer))

    _before_middle(trainer, begin)


def resume_and_carry(trainer: Trainer, carry: Carry) -> None:
    """Resume in a new copy before the step in the middle; ``carry`` is called after the state was loaded.

    Raises:
        CannotApply: the model is a function.
    """

    def begin() -> None:
        old = Old(_module(trainer), trainer.optimizer, trainer.scheduler)
        resume(trainer)
        carry(trainer, old)

    _before_middle(trainer, begin)


def _before_middle(trainer: Trainer, begin: Callable[[], None]) -> None:
    """Call ``begin`` before the step in the middle."""
    if trainer.module is None:
        raise CannotApply("the target is a function, which has no state_dict.")

    def before_step(number: int) -> None:
        if trainer.steps < 2:
            raise CannotApply("one step cannot be interrupted; use --steps 2 or more.")
        if number == trainer.steps // 2:
            begin()

    trainer.before_step = before_step


def resume(trainer: Trainer) -> None:
    """Replace model and optimizer by new ones that have loaded the state of the present ones.

    Raises:
        CannotApply: the state cannot be saved or loaded.
    """
    saved = _saved(trainer)
    with _savable():
        _start(trainer)
        load_state(trainer, torch.load(io.BytesIO(saved), weights_only=True))


def _saved(trainer: Trainer) -> bytes:
    """Return the state of model, optimizer, scheduler and generator, as ``torch.save`` writes it.

    Raises:
        CannotApply: the state cannot be saved, or not be loaded again.
    """
    parts = {"optimizer": trainer.optimizer, "scheduler": trainer.scheduler, "model": trainer.module}
    content = io.BytesIO()
    with _savable():
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        torch.save({**states, "generator": torch.get_rng_state()}, content)
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    return content.getvalue()


@contextmanager
def _savable() -> Iterator[None]:
    """Raise CannotApply for what the user's state_dict or load_state_dict raises."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CannotApply(f"its state cannot be saved and loaded: {first_line(error)}.") from error


def _start(trainer: Trainer) -> None:
    """Make a new copy of the model, and a new optimizer."""
    instance = trainer.recipe.instance(promoted=trainer.is_float64)
    instance.restore()
    trainer.instance, trainer.call, trainer.parameters = instance, instance.model, trained(instance)
    trainer.optimizer, trainer.scheduler = trainer.recipe.optimizer.make(unique(trainer.parameters))


def load_state(trainer: Trainer, loaded: dict[str, Any]) -> None:
    """Load the saved state into a run that has made no step."""
    _module(trainer).load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    if trainer.scheduler is not None:
        trainer.scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["generator"])


def experiments(argument: str | None) -> Experiments:
    """Yield the tests of GC439: all state outside of a state_dict carried over, then each part of it alone."""
    found: dict[str, None] = {}

    def carry_all(trainer: Trainer, old: Old) -> None:
        found.update(dict.fromkeys(_carry(trainer, old, None)))

    agrees = yield _experiment(found, carry_all)
    for name in list(found)[:_MOST_NAMES] if agrees and len(found) > 1 else []:
        if (yield _experiment([name], lambda trainer, old, name=name: _carry(trainer, old, name))):  # type: ignore[misc]
            return


def _experiment(names: Collection[str], carry: Callable[[Trainer, Old], Any]) -> Experiment:
    return Experiment(
        "GC439",
        lambda: (
            f"{', '.join(list(names)[:3])}{' …' if len(names) > 3 else ''} {'are' if len(names) > 1 else 'is'} in no "
            "state_dict; carried over to the new copy, the steps agree"
            if names
            else "a value that is in no state_dict is another one in a new process (it is drawn at the start, or "
            "kept in a global variable); in this process, the steps agree"
        ),
        "Register it as a persistent buffer, or return it from get_extra_state(); an optimizer keeps it in self.state.",
        lambda trainer, _: resume_and_carry(trainer, carry),
    )


def _carry(trainer: Trainer, old: Old, only: str | None) -> list[str]:
    """Copy the values that the new run lacks, or one of them, from the old run; return the names of all."""
    pairs = list(_pairs(trainer, old))
    tensors = zip(old.model.parameters(), _module(trainer).parameters(), strict=True)
    same_objects = [(before, after) for _, before, after, _ in pairs] + list(tensors)
    memo = {id(before): after for before, after in same_objects}
    names = []
    for name, before, after, keys in pairs:
        for key in keys:
            value, full = getattr(before, key), f"{name}.{key}".removeprefix(".")
            if is_same(frozen(value), frozen(getattr(after, key, None))):
                continue
            names.append(full)
            if only in (None, full):
                setattr(after, key, copy.deepcopy(value, dict(memo)))
    return names


def _pairs(trainer: Trainer, old: Old) -> Iterator[tuple[str, Any, Any, list[str]]]:
    """Yield the objects of the old run beside those of the new, with the names of their attributes."""
    modules = dict(_module(trainer).named_modules())
    for name, module in old.model.named_modules():
        if name in modules:
            yield name, module, modules[name], attribute_names(module)
    for name, before, after in (
        ("optimizer", old.optimizer, trainer.optimizer),
        ("scheduler", old.scheduler, trainer.scheduler),
    ):
        if before is not None:
            yield name, before, after, [key for key in vars(before) if not key.startswith("_") and key not in _SAVED]


def _module(trainer: Trainer) -> nn.Module:
    assert trainer.module is not None
    return trainer.module
