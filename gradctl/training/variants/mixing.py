"""Modules whose rows affect each other: what they return for a micro-batch is not what they return for the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradctl.subject.state import State
from gradctl.subject.tree import leaves
from gradctl.training.trainer import Trainer

if TYPE_CHECKING:
    from gradctl.training.variants.accumulation import Batch

# Inputs and outputs of the calls of each module, by its name.
Calls = dict[str, list[tuple[list[Tensor], list[Tensor]]]]
# Far above rounding in float32, far below what the statistics of half a batch change.
_SAME_ROWS = 1e-3


def difference(whole: Tensor, parts: Sequence[Tensor | None], size: int) -> bool:
    """Return whether the rows of micro-batches are others than those of the batch; False if there are no rows."""
    present = [part for part in parts if part is not None]
    if not whole.is_floating_point() or not whole.ndim or whole.shape[0] % size or len(present) < len(parts):
        return False
    if sum(part.shape[0] for part in present if part.ndim) != whole.shape[0]:
        return False
    if any(part.shape[1:] != whole.shape[1:] for part in present):
        return True
    found, reference = torch.cat(present).double(), whole.double()
    finite = torch.isfinite(reference)
    distance = torch.where(finite, found - reference, 0).norm()
    return bool(distance > _SAME_ROWS * torch.where(finite, reference, 0).norm())


def mixing_modules(trainer: Trainer, batch: Batch) -> dict[str, nn.Module]:
    """Return the modules, by name, whose inputs agree row by row and whose outputs do not; innermost alone."""
    model = trainer.module
    if model is None:
        return {}
    whole, parts = _calls(trainer, batch)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        calls = [whole.get(name, []), *(part.get(name, []) for part in parts)]
        if not calls[0] or len({len(each) for each in calls}) > 1:
            continue
        for call in zip(*calls, strict=True):
            inputs, outputs = (_differs([each[side] for each in call], batch.size) for side in (0, 1))
            if outputs and not inputs:
                found[name] = module
    return {
        name: each
        for name, each in found.items()
        if not any(other != name and f".{other}".startswith(f".{name}.".replace("..", ".")) for other in found)
    }


def _differs(values: Sequence[list[Tensor]], size: int) -> bool:
    whole, *parts = values
    return any(
        difference(tensor, [part[i] if i < len(part) else None for part in parts], size)
        for i, tensor in enumerate(whole)
    )


def _calls(trainer: Trainer, batch: Batch) -> tuple[Calls, list[Calls]]:
    """Return inputs and outputs of each call of each module, by its name: of the batch, and of each micro-batch."""
    state = State([trainer.instance.model])
    watching, whole = _watching(trainer.module)
    batch.record(watching)
    parts = []
    for part in batch.parts:
        watching, own = _watching(trainer.module)
        with watching, batch.replay(part):
            trainer.outputs(*part.args, **part.kwargs)
        parts.append(own)
    state.restore()
    return whole, parts


def _watching(model: nn.Module | None) -> tuple[AbstractContextManager[None], Calls]:
    """Return a context in which the calls of modules are recorded, and the record."""
    found: Calls = {}

    @contextmanager
    def watch() -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in model.named_modules() if model is not None else ():

                def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    found.setdefault(name, []).append((_tensors((args, kwargs)), _tensors(output)))

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    return watch(), found


def _tensors(value: Any) -> list[Tensor]:
    return [each.detach().clone() for _, each in leaves(value) if isinstance(each, Tensor)]
