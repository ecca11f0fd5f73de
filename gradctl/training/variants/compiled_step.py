"""``compile-step``: forward and backward through ``torch.compile``, and ``optimizer.step()`` as well.

The model and the optimizer are compiled apart, as PyTorch's documentation does it. Dynamo does not trace a backward
together with both by default.
"""

from __future__ import annotations

from typing import Any

import torch

from gradctl.subject.torch_private import reset_dynamo
from gradctl.training.trainer import Trainer
from gradctl.training.variants.compiled_forward import OPTIONS, checked, compiled_frames


def alter(trainer: Trainer, argument: str | None) -> None:
    """Compile the model and the step of the optimizer with inductor."""
    reset_dynamo()
    frames: dict[str, int] = {"update": 0}
    # Without the wrapper that calls hooks: Dynamo would compile them, too. ``torch.optim`` wraps each class's own.
    own_step: Any = type(trainer.optimizer).step
    compiled: Any = torch.compile(getattr(own_step, "__wrapped__", own_step), options=OPTIONS)

    def update() -> None:
        trainer.record_update()
        before = compiled_frames()
        compiled(trainer.optimizer)
        frames["update"] += compiled_frames() - before

    trainer.call = torch.compile(trainer.instance.model, options=OPTIONS)
    trainer.update = update
    trainer.step = checked(trainer.step, lambda: frames["update"])
