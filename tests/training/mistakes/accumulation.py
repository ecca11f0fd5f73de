"""Steps that accumulate gradients over micro-batches, and do not compute the gradient of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.training.mistakes.mistake import Mistake

IGNORED = -100
MICRO_BATCH = 2


class Tagger(nn.Module):
    """A label for each token; the loss is a mean over the tokens that have one."""

    def __init__(self, tokens: int = 11, width: int = 8, labels: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, labels)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tagger(wrong: bool) -> nn.Module:
    """Return the model; the mistakes of this file are in the steps."""
    torch.manual_seed(0)
    return Tagger()


def padded_batch() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return five sequences of different lengths: the last micro-batch has one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (5, 6), generator=generator)
    labels = torch.randint(0, 5, (5, 6), generator=generator)
    for row, length in enumerate((6, 5, 2, 4, 3)):
        labels[row, length:] = IGNORED
    return (ids, labels), {}


def micro_batches(ids: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield micro-batches of two sequences, the last of one."""
    return zip(ids.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)


def tokens(labels: Tensor) -> int:
    """Return how many tokens have a label."""
    return int((labels != IGNORED).sum())


def accumulating(weight: Callable[[Tensor, Tensor], float], *, drop_last: bool = False) -> Callable[..., Tensor]:
    """Return a step that sums the losses of micro-batches, each times ``weight(its labels, all labels)``."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for some, own in micro_batches(ids, labels):
            if drop_last and len(some) < MICRO_BATCH:
                break
            loss = model(some, own)["loss"] * weight(own, labels)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    return step


by_tokens = accumulating(lambda own, labels: tokens(own) / tokens(labels))


def clearing_inside(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
    """Clear the gradients in the loop over micro-batches: only those of the last are left."""
    total = torch.zeros(())
    for some, own in micro_batches(ids, labels):
        optimizer.zero_grad()
        loss = model(some, own)["loss"] * (tokens(own) / tokens(labels))
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def stepping_inside(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> Tensor:
    """Step the optimizer after each micro-batch."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for some, own in micro_batches(ids, labels):
        loss = model(some, own)["loss"] * (tokens(own) / tokens(labels))
        loss.backward()
        optimizer.step()
        total = total + loss.detach()
    return total


def _mistake(name: str, source: str, step: Callable[..., Tensor]) -> Mistake:
    return Mistake(name, source, "step", tagger, padded_batch, step=lambda wrong: step if wrong else by_tokens)


MISTAKES = [
    _mistake("not_divided", "karpathy/nanoGPT 206", accumulating(lambda own, labels: 1.0)),
    _mistake(
        "mean_of_means", "huggingface/blog 2414 (transformers, October 2024)", accumulating(lambda own, labels: 1 / 3)
    ),
    _mistake(
        "times_the_steps",
        "axolotl-ai-cloud/axolotl 2262",
        accumulating(lambda own, labels: 3 * tokens(own) / tokens(labels)),
    ),
    _mistake(
        "divided_twice", "modelscope/ms-swift 10117", accumulating(lambda own, labels: tokens(own) / tokens(labels) / 3)
    ),
    _mistake(
        "last_micro_batch_dropped",
        "ml-explore/mlx-lm 1413",
        accumulating(lambda own, labels: tokens(own) / tokens(labels), drop_last=True),
    ),
    _mistake(
        "normalised_by_all_tokens",
        "OpenNMT/OpenNMT-py 2209",
        accumulating(lambda own, labels: own.numel() / labels.numel()),
    ),
    _mistake("gradients_cleared_inside", "pytorch.org/docs/stable/notes/amp_examples.html", clearing_inside),
    _mistake("stepped_inside", "pytorch.org/docs/stable/notes/amp_examples.html", stepping_inside),
]
