"""The variants that a user asks for: rows of the table by name, and steps that the user has written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import TargetError, nearest
from gradctl.core.names import VARIANTS, VARIANTS_OF_RANKS
from gradctl.subject.loading.target import find_by_text
from gradctl.subject.state import State
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import TABLE, Alter, Variant

_SIGNATURE = "step(model, optimizer, *args, **kwargs) -> loss"


@dataclass(frozen=True, slots=True, eq=False)
class ChosenVariant:
    """One variant to compare.

    Attributes:
        name: what messages call it: ``accumulate:2``.
        row: how it is compared.
        argument: the text behind the colon.
        own: the user's step, if the user wrote it.
        change: changes a run, if the variant is in no row.
    """

    name: str
    row: Variant
    argument: str | None = None
    own: Callable[..., Any] | None = None
    change: Callable[[Trainer], None] | None = None

    def alter(self, trainer: Trainer) -> None:
        """Change a run from the plain step to the variant.

        Raises:
            CannotApply: with the reason.
        """
        if self.own is not None:
            use_own_step(trainer, self.own)
        elif self.change is not None:
            self.change(trainer)
        else:
            self.row.function(self.row.entry)(trainer, self.argument)

    def alter_plain(self) -> Callable[[Trainer], None] | None:
        """Return what changes the plain step that it is compared with, if that is not the model's own."""
        if self.row.plain is None:
            return None
        function: Alter = self.row.function(self.row.plain)
        return lambda trainer: function(trainer, self.argument)


def choose_variants(given: Iterable[str | Callable[..., Any]], target: str | None) -> list[ChosenVariant]:
    """Return the variants of ``--variant``; all of the table that run in one process if none is given.

    Args:
        given: names with their arguments, ``NAME`` of a function beside the target, ``FILE:NAME``, or the function.
        target: what the names of functions are beside; None in Python, where functions are given themselves.

    Raises:
        TargetError: GC145 if there is no such variant, or it takes no argument; GC101 to GC103 for a file.
    """
    chosen = [_chosen(each, target) for each in given]
    return chosen or [_named(name, default) for name, default in VARIANTS.items() if name not in VARIANTS_OF_RANKS]


def variant_names(given: Iterable[str]) -> list[str]:
    """Return the names of the variants that are compared, defaults with their arguments; nothing is imported."""
    defaults = [_with_argument(name, each) for name, each in VARIANTS.items() if name not in VARIANTS_OF_RANKS]
    return list(dict.fromkeys(given)) or defaults


def is_of_table(name: str) -> bool:
    """Return whether a text names a row of the table, with or without an argument."""
    return name.partition(":")[0] in VARIANTS


def _chosen(given: str | Callable[..., Any], target: str | None) -> ChosenVariant:
    if not isinstance(given, str):
        if not callable(given):
            raise TargetError("GC145", f"the variant {given!r} is no function. Give a name, or {_SIGNATURE}.")
        return _own(getattr(given, "__name__", type(given).__name__), given)
    name, colon, argument = given.partition(":")
    if name in VARIANTS:
        if colon and VARIANTS[name] is None:
            raise TargetError("GC145", f"the variant {name} takes no argument, and {argument!r} is given.")
        return _named(name, argument if colon else VARIANTS[name])
    if not colon and target is None:
        said = f"there is no variant {given!r}{nearest(given, VARIANTS)}. Give {_listed()}, or a function {_SIGNATURE}."
        raise TargetError("GC145", said)
    try:
        return _own(given, find_by_text(given, "GC145", None if colon else target))
    except TargetError as error:
        if error.code != "GC145" or colon:
            raise
        known = f"Variants: {_listed()}{nearest(given, VARIANTS)}"
        raise TargetError("GC145", f"--variant {given!r} is no variant: {error.message} {known}.") from error


def _named(name: str, argument: str | None) -> ChosenVariant:
    return ChosenVariant(_with_argument(name, argument), TABLE[name], argument)


def _with_argument(name: str, argument: str | None) -> str:
    return name if argument is None else f"{name}:{argument}"


def _listed() -> str:
    return ", ".join(_with_argument(name, default) for name, default in VARIANTS.items())


def _own(name: str, step: Any) -> ChosenVariant:
    if not callable(step) or inspect.isclass(step):
        kind = "a class" if inspect.isclass(step) else f"of type {type(step).__name__!r}"
        raise TargetError("GC145", f"the variant {name} is {kind}. Give a function {_SIGNATURE}.")
    return ChosenVariant(name, Variant(""), own=step)


def use_own_step(trainer: Trainer, step: Callable[..., Any]) -> None:
    """Let the user's function make each step; what it keeps is restored before each run."""
    state = State([step])

    device = next((each.device.type for group in trainer.parameters.values() for each in group), "cpu")

    def observe(*_: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_autocast_enabled(device):
            trainer.autocast = str(torch.get_autocast_dtype(device)).removeprefix("torch.")

    def observed(*args: Any, **kwargs: Any) -> Any:
        observe()
        return trainer.call(*args, **kwargs)

    if trainer.module is not None:
        trainer.module.register_forward_pre_hook(observe)

    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        loss = step(observed if trainer.module is None else trainer.call, trainer.optimizer, *args, **kwargs)
        if loss is None:
            trainer.notes[:] = ["the step returns no loss, which is not compared"]
            return None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss
        if isinstance(loss, int | float):
            return torch.tensor(float(loss), dtype=torch.float64)
        raise TargetError(
            "GC145", f"the step returns {type(loss).__name__!r}. Return the loss, a scalar tensor, or None."
        )

    def begin(number: int) -> None:
        if number == 0:
            state.restore()

    trainer.step, trainer.before_step = run, begin
