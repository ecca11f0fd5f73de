"""Models whose blocks are not functions of their inputs, and checkpointing that loses gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from tests.training.mistakes.mistake import Mistake

WIDTH = 8


def rows() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return one input of four rows."""
    return (torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)),), {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Three blocks of one class."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class OffsetBlock(Block):
    """A block that scales by an offset: an attribute that the model sets, or an argument."""

    offset: Tensor | None = None

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        offset = self.offset if offset is None else offset
        hidden = torch.tanh(self.linear(x))
        return x + hidden * (torch.zeros(()).to(x) if offset is None else offset)


class OffsetStack(Stack):
    """Sets the offset of each block for the forward alone: in the backward it is gone."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(*(OffsetBlock() for _ in range(3)))
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        offset = x.mean().detach() + 2
        x = self.embed(x)
        for block in self.blocks:
            if self.wrong:
                block.offset = offset
                x = block(x)
                block.offset = None
            else:
                x = block(x, offset)
        return self.head(x)


class CachingBlock(Block):
    """Appends its keys to a cache and attends to all of it, as a decoder with a key-value cache."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        keys = self.linear(x)
        if self.wrong:
            cache.append(keys.mean(0))
        attended = cache if self.wrong else [keys.mean(0)]
        return x + torch.tanh(keys) * torch.stack(attended).sum(0)


class CachingStack(Stack):
    """Gives each block a cache of its own."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(*(CachingBlock(wrong) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, [])
        return self.head(x)


class CountingBlock(Block):
    """Takes another branch at every other call."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong, self.calls = wrong, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += int(self.wrong)
        scale = 1.0 if self.calls % 2 == 0 else 0.5
        return x + torch.tanh(self.linear(x) * scale)


class DroppingBlock(Block):
    """Dropout with a generator of its own, whose state a checkpoint does not keep."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3) if wrong else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        mask = torch.rand(hidden.shape, generator=self.generator) < 0.5
        return x + hidden * mask.to(hidden) * 2


class NormBlock(Block):
    """A normalisation over the batch, whose running statistics the recomputation updates again."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=True) if wrong else nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.linear(x)))


class RandomReluBlock(Block):
    """``nn.RReLU`` saves its noise before it is drawn."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.relu = nn.RReLU() if wrong else nn.LeakyReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.linear(x))


def _stack(block: type[nn.Module]) -> Any:
    def make(wrong: bool) -> nn.Module:
        torch.manual_seed(0)
        return Stack(*(block(wrong) for _ in range(3)))

    return make


def _made(model: type[nn.Module]) -> Any:
    def make(wrong: bool) -> nn.Module:
        torch.manual_seed(0)
        return model(wrong)

    return make


def plain(wrong: bool) -> nn.Module:
    """Return a model of pure blocks, for steps that checkpoint on their own."""
    torch.manual_seed(0)
    return Stack(Block(), Block(), Block())


class InputOnly(Function):
    """Checkpointing whose backward differentiates with respect to the input, and not to the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.block = block
        return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.block(x), x, gradient)
        return found, None


def mean_square(outputs: Tensor) -> Tensor:
    """Return the loss of the steps of this file."""
    return outputs.square().mean()


def _trained(model: Stack, optimizer: torch.optim.Optimizer, hidden: Tensor) -> Tensor:
    loss = mean_square(model.head(hidden))
    loss.backward()
    optimizer.step()
    return loss


def differentiating_the_input_only(wrong: bool) -> Any:
    def step(model: Stack, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        x = model.embed(x)
        for block in model.blocks:
            x = InputOnly.apply(x, block) if wrong else checkpoint(block, x, use_reentrant=False)
        return _trained(model, optimizer, x)

    return step


def recomputing_from_the_first_input(wrong: bool) -> Any:
    """Return a step that recomputes a group of blocks; the mistake calls each on the input of the first."""

    def step(model: Stack, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        def group(first: Tensor) -> Tensor:
            hidden = first
            for block in model.blocks:
                hidden = block(first if wrong else hidden)
            return hidden

        optimizer.zero_grad()
        return _trained(model, optimizer, checkpoint(group, model.embed(x), use_reentrant=False))

    return step


def _of_model(name: str, source: str, model: Callable[[bool], nn.Module], cause: str | None = "GC437") -> Mistake:
    return Mistake(name, source, "checkpoint", model, rows, cause=cause)


def _of_step(name: str, source: str, step: Callable[[bool], Any]) -> Mistake:
    return Mistake(name, source, "step", plain, rows, step=step, loss=mean_square)


MISTAKES = [
    _of_model("offsets_gone", "huggingface/peft 2826", _made(OffsetStack)),
    _of_model("cache_grows", "pytorch/pytorch 155171", _made(CachingStack)),
    _of_model("calls_counted", "pytorch/pytorch 155171", _stack(CountingBlock)),
    _of_model("own_generator", "pytorch/pytorch 190758", _stack(DroppingBlock)),
    _of_model("statistics_twice", "pytorch/pytorch 42212", _stack(NormBlock)),
    _of_model("noise_before_it_is_drawn", "pytorch/pytorch 193671", _stack(RandomReluBlock), cause=None),
    _of_step("input_only", "ooples/AiDotNet.Tensors 643", differentiating_the_input_only),
    _of_step("first_input", "NVIDIA/Megatron-LM 290", recomputing_from_the_first_input),
]
