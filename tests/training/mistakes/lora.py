"""Models whose adapters lose their gradient if the base is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from tests.training.mistakes.mistake import Mistake

WIDTH = 8


def ids() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return token numbers, which have no gradient."""
    return (torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1)),), {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Decoder(nn.Module):
    """An embedding, two blocks, a head; ``run`` calls a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 11)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


class Checkpointing(Decoder):
    """Reentrant checkpointing: the output of a frozen embedding requires no gradient, so nothing is recomputed."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=self.wrong)


class WithoutGraph(Decoder):
    """Runs a block whose own weights are frozen without a graph."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        is_trained = block.up.weight.requires_grad or not self.wrong
        with torch.set_grad_enabled(is_trained):
            return block(x)


class Detaching(Decoder):
    """Detaches what comes before a frozen head."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        if self.wrong and not self.head.weight.requires_grad:
            x = x.detach()
        return self.head(x)


class Fused(Function):
    """A linear layer whose backward returns no gradient of the input if the weight needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, wrong: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wrong = wrong
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        is_needed = ctx.needs_input_grad[1] or not ctx.wrong
        flat = gradient.flatten(0, -2)
        return gradient @ weight if is_needed else None, flat.T @ x.flatten(0, -2), flat.sum(0), None


class FusedLinear(nn.Linear):
    """A linear layer with a kernel of its own."""

    wrong = False

    def forward(self, x: Tensor) -> Tensor:
        return Fused.apply(x, self.weight, self.bias, self.wrong)


class WithFused(Decoder):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.head = FusedLinear(WIDTH, 11)
        self.head.wrong = wrong


def _made(model: type[nn.Module]) -> Any:
    def make(wrong: bool) -> nn.Module:
        torch.manual_seed(0)
        return model(wrong)

    return make


def _mistake(name: str, source: str, model: type[nn.Module]) -> Mistake:
    return Mistake(name, source, "lora:4", _made(model), ids, cause="GC438")


MISTAKES = [
    _mistake("reentrant_checkpoint", "huggingface/peft 1142", Checkpointing),
    _mistake("blocks_without_graph", "modelscope/ms-swift 4571", WithoutGraph),
    _mistake("detached_before_the_head", "NVIDIA-NeMo/Megatron-Bridge 5963", Detaching),
    _mistake("no_gradient_of_the_input", "bitsandbytes-foundation/bitsandbytes 182", WithFused),
]
