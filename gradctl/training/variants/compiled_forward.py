"""``compile``: the forward through ``torch.compile``, its backward through AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import is_out_of_memory
from gradctl.forms.reasons import reason_of
from gradctl.forms.silence import silenced
from gradctl.subject.torch_private import dynamo_counters, reset_dynamo
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply

# As an option it also applies if another input triggers a recompilation. Inductor's own random numbers are others than
# eager's (pytorch 113169).
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True}


def alter(trainer: Trainer, argument: str | None) -> None:
    """Compile the model with inductor."""
    reset_dynamo()
    trainer.call = torch.compile(trainer.instance.model, options=OPTIONS)
    trainer.step = checked(trainer.step, compiled_frames)


def checked(step: Callable[..., Tensor | None], frames: Callable[[], int]) -> Callable[..., Tensor | None]:
    """Return a step that raises CannotApply at its first call if the compiler raises, or compiled nothing.

    Args:
        step: of a variant that compiles.
        frames: returns how many frames were compiled so far: Dynamo silently runs eagerly what it cannot compile.
    """
    is_first, before = True, frames()

    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        nonlocal is_first
        if not is_first:
            with silenced():
                return step(*args, **kwargs)
        is_first = False
        try:
            with silenced():
                loss = step(*args, **kwargs)
        except Exception as error:  # the compiler may raise anything; the model itself has run in the plain step
            if is_out_of_memory(error):
                raise
            raise CannotApply(f"torch.compile fails: {reason_of(error)}.") from error
        if frames() == before:
            raise CannotApply("torch.compile compiled no frame of this model and would run it eagerly.")
        return loss

    return run


def compiled_frames() -> int:
    """Return how many frames Dynamo has compiled since it was reset."""
    return int(dynamo_counters["frames"]["ok"])
