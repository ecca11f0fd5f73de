"""``fused``: the optimizer updates all parameters in one kernel."""

from __future__ import annotations

from gradctl.core.errors import TargetError
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply


def alter(trainer: Trainer, argument: str | None) -> None:
    """Set the optimizer's option ``fused``."""
    groups, name = trainer.optimizer.param_groups, trainer.recipe.optimizer.name
    if not all("fused" in group for group in groups):
        raise CannotApply(f"the optimizer {name} has no option fused.")
    if all(group["fused"] for group in groups):
        raise CannotApply(f"the optimizer {name} has fused=True in the plain step, too.")
    for group in groups:
        group["fused"], group["foreach"] = True, False

    def update() -> None:
        try:
            trainer.plain_update()
        except TargetError as error:  # of a dtype or device without such a kernel
            raise CannotApply(f"fused=True: {error.message}") from error

    trainer.update = update
