"""``checkpoint-reentrant``: blocks under the older kind of activation checkpointing, which runs their forward twice.

It needs an input of the block that requires a gradient; without one, the parameters of the block get none. The first
block of a model that is trained as a whole is given one (``enable_input_require_grads`` of transformers does the same),
because there the remedy is known; behind frozen parameters it is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import is_out_of_memory
from gradctl.subject.tree import leaves, map_leaves
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variants.checkpoint import checkpoint_blocks, experiments_of_kind, recomputed
from gradctl.training.variants.table import CannotApply

_INCOMPATIBLE = "incompatible with .grad()"


def alter(trainer: Trainer, argument: str | None) -> None:
    """Checkpoint blocks, reentrant."""
    frozen = [each for each in _parameters(trainer.module) if not each.requires_grad and each.is_floating_point()]
    checkpoint_blocks(trainer, is_reentrant=True, run=None if frozen else partial(_with_gradient, trainer))
    step = trainer.step

    def checked(*args: Any, **kwargs: Any) -> Tensor | None:
        try:
            return step(*args, **kwargs)
        except RuntimeError as error:
            if is_out_of_memory(error) or _INCOMPATIBLE not in str(error):
                raise
            raise CannotApply("the model calls torch.autograd.grad on what a reentrant checkpoint returns.") from error

    trainer.step = checked


def _parameters(model: nn.Module | None) -> list[Tensor]:
    return list(model.parameters()) if model is not None else []


def _with_gradient(
    trainer: Trainer, block: nn.Module, forward: Callable[..., Any], is_reentrant: bool, /, *args: Any, **kwargs: Any
) -> Any:
    """Run a block on inputs of which one requires a gradient."""
    given = [each for _, each in leaves((args, kwargs)) if isinstance(each, Tensor)]
    if torch.is_grad_enabled() and not any(each.requires_grad for each in given):
        args, kwargs = map_leaves(_requiring, (args, kwargs))
    return recomputed(block, forward, is_reentrant, *args, **kwargs)


def _requiring(_: str, leaf: object) -> object:
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.detach().requires_grad_()
    return leaf


def experiments(argument: str | None) -> Experiments:
    """Yield the test of GC437, and of GC438: a block whose inputs require no gradient."""
    agrees = yield from experiments_of_kind(is_reentrant=True)
    if not agrees:
        yield Experiment(
            "GC438",
            lambda: "no input of a block requires a gradient; with one that does, the gradients agree",
            "Call enable_input_require_grads(), or checkpoint with use_reentrant=False.",
            lambda trainer, _: checkpoint_blocks(
                trainer, is_reentrant=True, run=partial(_with_gradient, trainer), is_forced=True
            ),
        )
