"""``amp:bf16`` and ``amp:f16``: mixed precision as ``torch.autocast`` does it, for f16 with a ``GradScaler``.

The parameters stay in their own dtype, so there is no float64 run of it. Tolerance and noise are those of the narrower
dtype: the noise is the change of a tensor when weights and inputs move by one ULP of it. So only large errors are seen.
Measured on networks of three linear layers with relu, 8 and 64 wide: a gradient that is too large by a factor of 2 in
bf16 and of 1.5 in f16 was found in 8 of 8, by 1.5 in bf16 in 5 of 8, by 1.1 in f16 in 6 of 8. Right models were within
0.5 tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.subject.frames import first_line
from gradctl.subject.seeding import seed_generators
from gradctl.subject.state import State
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import AUTOCAST_DTYPES, CannotApply

# ``GradScaler`` starts at 2**16 and halves the scale at each overflow: at 2**-8 it has overflowed in the forward.
_ATTEMPTS = 24


def alter(trainer: Trainer, argument: str | None) -> None:
    """Run the forward under autocast, and scale the loss if the dtype is float16."""
    dtype: torch.dtype = getattr(torch, AUTOCAST_DTYPES[argument or ""])
    device = next((each.device.type for group in trainer.parameters.values() for each in group), "cpu")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with _applying(trainer), torch.autocast(device, dtype):
            outputs = trainer.outputs(*args, **kwargs)
        for name, output in outputs.items():
            if output.dtype == dtype and bool((output.isnan() | output.isposinf()).any()):
                _note(trainer, f"{name} is NaN or infinite in {str(dtype).removeprefix('torch.')}")
        # What is summed with random weights is no part of the model.
        wide = {name: t.float() if t.dtype == dtype else t for name, t in outputs.items()}
        return trainer.loss_of(wide if trainer.recipe.loss_name(outputs) is None else outputs)

    def backward(loss: Tensor) -> None:
        with _applying(trainer):
            trainer.plain_backward(loss)

    trainer.forward, trainer.backward = forward, backward
    if dtype == torch.float16:
        _scale(trainer, device)


@contextmanager
def _applying(trainer: Trainer) -> Iterator[None]:
    """Raise CannotApply in the first step for what the model raises: one of its operators does not take two dtypes."""
    try:
        yield
    except Exception as error:
        if trainer.number or isinstance(error, TargetError) or is_out_of_memory(error):
            raise
        raise CannotApply(f"the model raises under autocast: {first_line(error)}.") from error


def _scale(trainer: Trainer, device: str) -> None:
    """Scale losses with a ``GradScaler``; a step that it skips is repeated with the next scale, on the same batch."""
    scaler = torch.amp.GradScaler(device)
    updates = 0

    def backward(loss: Tensor) -> None:
        with _applying(trainer):
            trainer.plain_backward(scaler.scale(loss))

    def update() -> None:
        scaler.step(trainer.optimizer)
        scaler.update()

    def counted(*_: Any) -> None:
        nonlocal updates
        updates += 1

    def step(*args: Any, **kwargs: Any) -> Tensor | None:
        state, before, scale = State([trainer.instance.model]), updates, scaler.get_scale()
        loss = None
        for _ in range(_ATTEMPTS):
            seed_generators(trainer.recipe.subject.seed + trainer.number)
            loss = trainer.plain_step(*args, **kwargs)
            if updates > before:
                break
            state.restore()
        if updates == before:
            _note(trainer, f"GradScaler skips step {trainer.number + 1} at each scale from {scale:g} down")
            trainer.record_update()
        elif scaler.get_scale() < scale:
            _note(trainer, f"GradScaler skipped steps down to a scale of {scaler.get_scale():g}")
        return loss

    trainer.optimizer.register_step_pre_hook(counted)
    trainer.backward, trainer.update, trainer.step = backward, update, step


def _note(trainer: Trainer, text: str) -> None:
    """Add a note; of several that begin alike, the last is kept."""
    begin = text[: len("GradScaler skip")]
    trainer.notes[:] = [*(each for each in trainer.notes if not each.startswith(begin)), text]
