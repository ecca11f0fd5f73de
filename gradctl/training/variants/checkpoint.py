"""``checkpoint`` and ``checkpoint-reentrant``: each block of a repeated module runs under activation checkpointing.

A model with a method ``gradient_checkpointing_enable`` (transformers) checkpoints its blocks on its own; any other has
the forward of each block wrapped. The backward runs the block again, on the same random numbers; a block that is not a
function of its inputs then computes something else.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradctl.subject.state import State
from gradctl.subject.tree import leaves, map_leaves
from gradctl.training.hidden_state import changed, frozen, is_same, state_of
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply

# How a block runs: ``run(block, its forward, is_reentrant, *args, **kwargs)``.
Run = Callable[..., Any]
_HINT = (
    "Pass what the block reads as an argument, keep what it counts outside of it, and draw random numbers from the "
    "global generator; or do not checkpoint this block."
)


def alter(trainer: Trainer, argument: str | None) -> None:
    """Checkpoint blocks, non-reentrant."""
    checkpoint_blocks(trainer, is_reentrant=False)


def checkpoint_blocks(trainer: Trainer, *, is_reentrant: bool, run: Run | None = None, is_forced: bool = False) -> None:
    """Checkpoint blocks.

    Args:
        trainer: the run to alter.
        is_reentrant: which kind.
        run: how a block runs, if not by ``torch.utils.checkpoint`` alone.
        is_forced: whether blocks are wrapped even if the model checkpoints them on its own.

    Raises:
        CannotApply: no module is repeated.
    """
    if not is_forced and _enable_own(trainer, is_reentrant=is_reentrant):
        return
    blocks = repeated_blocks(trainer.module)
    if not blocks:
        raise CannotApply("no list of modules (ModuleList, Sequential) has two modules of one class.")
    for block in blocks.values():
        block.forward = partial(run or recomputed, block, block.forward, is_reentrant)


def recomputed(block: nn.Module, forward: Callable[..., Any], is_reentrant: bool, /, *args: Any, **kwargs: Any) -> Any:
    """Return what a block returns, to be computed again in the backward.

    Reentrant checkpointing differentiates tensors among its positional arguments and outputs alone, so that nested ones
    are passed one by one.
    """
    if not is_reentrant:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    tensors: list[Tensor] = []
    _map_tensors(tensors.append, (args, tuple(kwargs.values())))
    structure: list[Any] = []

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        own = iter(given)
        own_args, values = _map_tensors(lambda _: next(own), (args, tuple(kwargs.values())))
        structure[:] = [forward(*own_args, **dict(zip(kwargs, values, strict=True)))]
        return tuple(each for _, each in leaves(structure[0]) if isinstance(each, Tensor))

    outputs = iter(checkpoint(flat, *tensors, use_reentrant=True))
    return map_leaves(lambda _, leaf: next(outputs) if isinstance(leaf, Tensor) else leaf, structure[0])


def _map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a value with each tensor in nested tuples mapped; anything else is the same object, such as a cache."""
    if isinstance(value, Tensor):
        return function(value)
    return tuple(_map_tensors(function, each) for each in value) if type(value) is tuple else value


def _enable_own(trainer: Trainer, *, is_reentrant: bool) -> bool:
    """Enable the model's own checkpointing, and return whether it has some."""
    enable = getattr(trainer.module, "gradient_checkpointing_enable", None)
    if not callable(enable) or not getattr(trainer.module, "supports_gradient_checkpointing", False):
        return False
    if trainer.module is not None and not trainer.module.training:
        raise CannotApply("the model's own checkpointing runs in training mode only; use --train.")
    if "gradient_checkpointing_kwargs" not in inspect.signature(enable).parameters:
        return False
    enable(gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
    trainer.notes.append("by the model's own gradient_checkpointing_enable")
    return True


def repeated_blocks(model: nn.Module | None) -> dict[str, nn.Module]:
    """Return the modules, by name, of the outermost lists that hold two or more of one class that has parameters."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, parent in model.named_modules() if model is not None else ():
        if isinstance(parent, nn.ModuleList | nn.Sequential) and id(parent) not in inside:
            blocks = {key: each for key, each in parent.named_children() if next(each.parameters(), None) is not None}
            count = Counter(map(type, blocks.values()))
            repeated = {key: each for key, each in blocks.items() if count[type(each)] > 1}
            found |= {f"{name}.{key}".removeprefix("."): each for key, each in repeated.items()}
            inside |= {id(module) for block in repeated.values() for module in block.modules()}
    return found


def experiments(argument: str | None) -> Experiments:
    """Yield the test of GC437: the recomputation starts from the state that the block had in the forward."""
    yield from experiments_of_kind(is_reentrant=False)


def experiments_of_kind(*, is_reentrant: bool) -> Generator[Experiment, bool, bool]:
    """Yield the test of GC437 for one kind of checkpointing; return whether the blocks agree."""
    names: dict[str, None] = {}

    def alter_with_state(trainer: Trainer, _: str | None) -> None:
        named = {id(block): name for name, block in repeated_blocks(trainer.module).items()}

        def note(block: nn.Module, attributes: Sequence[str]) -> None:
            name = named[id(block)]
            names.update(dict.fromkeys([f"{name}.{each}" for each in attributes] or [f"an argument of {name}"]))

        run = partial(_from_same_state, note)
        checkpoint_blocks(trainer, is_reentrant=is_reentrant, run=run, is_forced=True)

    agrees = yield Experiment(
        "GC437",
        lambda: (
            f"{', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''} changed between the forward of the blocks "
            "and its recomputation; with the values of the forward, they agree"
        ),
        _HINT,
        alter_with_state,
    )
    return agrees


def _from_same_state(
    note: Callable[[nn.Module, Sequence[str]], None],
    block: nn.Module,
    forward: Callable[..., Any],
    is_reentrant: bool,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a block whose recomputation starts from the state of its forward, and leaves the present state as it is.

    The state is that of the block and its arguments (a cache). ``note`` is called with a block whose state has changed
    in between, and its attributes that have.
    """
    roots, runs = [block, args, kwargs], 0
    before = State(roots)
    values, given = state_of(block), frozen((args, kwargs))

    def run(*own_args: Any, **own_kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 1:
            return forward(*own_args, **own_kwargs)
        attributes = changed(values, state_of(block))
        if attributes or not is_same(given, frozen((args, kwargs))):
            note(block, attributes)
        present = State(roots)
        before.restore()
        try:
            return forward(*own_args, **own_kwargs)
        finally:
            present.restore()

    return recomputed(block, run, is_reentrant, *args, **kwargs)
