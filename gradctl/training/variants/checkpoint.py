"""``checkpoint``: each block of a repeated module runs under activation checkpointing, non-reentrant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply


def alter(trainer: Trainer, argument: str | None) -> None:
    """Wrap the forward of each block: its backward runs it again, on the same random numbers."""
    blocks = _blocks(trainer.module)
    if not blocks:
        raise CannotApply("no list of modules (ModuleList, Sequential) has two modules of one class.")
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(model: nn.Module | None) -> list[nn.Module]:
    """Return the modules of the outermost lists that hold two or more of one class which has parameters."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for parent in model.modules() if model is not None else ():
        if isinstance(parent, nn.ModuleList | nn.Sequential) and id(parent) not in inside:
            blocks = [each for each in parent if next(each.parameters(), None) is not None]
            count = Counter(map(type, blocks))
            repeated = [each for each in blocks if count[type(each)] > 1]
            found += repeated
            inside |= {id(module) for block in repeated for module in block.modules()}
    return found
