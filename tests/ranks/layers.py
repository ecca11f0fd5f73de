"""Models and collectives that the targets of this folder share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(nn.Module):
    """Two linear layers; returns the mean of the loss over the samples."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.fc2(torch.tanh(self.fc1(x))), labels)


def samples() -> tuple[Tensor, Tensor]:
    """Return eight samples with their labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def average_gradients(parameters: Any) -> None:
    """Let each parameter average its gradient over the ranks as soon as it is complete."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def sum_gradients(parameters: Any) -> None:
    """Let each parameter sum its gradient over the ranks as soon as it is complete."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda each: dist.all_reduce(each.grad))


def keep_rows(linear: nn.Linear, mesh: Any) -> None:
    """Keep this rank's rows of a weight and its bias: the layer computes some of its outputs."""
    rank, world = mesh.get_local_rank(), mesh.size()
    linear.weight = nn.Parameter(linear.weight.detach().chunk(world, 0)[rank].clone())
    linear.bias = nn.Parameter(linear.bias.detach().chunk(world, 0)[rank].clone())


def keep_columns(linear: nn.Linear, mesh: Any) -> None:
    """Keep this rank's columns of a weight: the layer computes a part of the sum in each output."""
    rank, world = mesh.get_local_rank(), mesh.size()
    linear.weight = nn.Parameter(linear.weight.detach().chunk(world, 1)[rank].clone())


def whole(inputs: tuple[Any, ...], rank: int, world: int) -> tuple[Any, ...]:
    """Return the inputs: each rank computes on all of them."""
    return inputs


class SumGradient(torch.autograd.Function):
    """The identity, whose backward sums over the ranks (f of Megatron-LM)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class SumOutput(torch.autograd.Function):
    """The sum over the ranks, whose backward is the identity (g of Megatron-LM)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class SumBoth(torch.autograd.Function):
    """The sum over the ranks, whose backward is a sum, too: right if each rank has a loss of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Gather(torch.autograd.Function):
    """The rows of all ranks, whose backward sums the gradients of this rank's rows over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), ctx.axis)[dist.get_rank()], None
