"""``foreach``: the optimizer updates all parameters in one call for each operation, as it does on GPUs by default."""

from __future__ import annotations

from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply


def alter(trainer: Trainer, argument: str | None) -> None:
    """Set the optimizer's option ``foreach``."""
    groups = trainer.optimizer.param_groups
    if not all("foreach" in group for group in groups):
        raise CannotApply(f"the optimizer {trainer.recipe.optimizer.name} has no option foreach.")
    if all(group["foreach"] for group in groups):
        raise CannotApply(f"the optimizer {trainer.recipe.optimizer.name} has foreach=True in the plain step, too.")
    for group in groups:
        group["foreach"] = True
        if group.get("fused"):
            group["fused"] = False
