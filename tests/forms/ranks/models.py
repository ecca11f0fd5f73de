"""Models with what their authors wrote to run them on many ranks: right, or with one mistake each."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist
from torch import nn

from gradctl.subject.subject import Subject


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def subject_of(model=None, batch: int = 4, loss=None, **beside) -> Subject:
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(1))
    return Subject("net", model or small_net(), (x,), loss=loss, beside=beside)


def averaging(*names: str):
    """Return a right ``parallelize``, but for parameters whose name ends in one of ``names``: they are left out."""

    def parallelize(model, mesh):
        def average(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= mesh.size()

        for name, parameter in model.named_parameters():
            if not (names and name.endswith(names)):
                parameter.register_post_accumulate_grad_hook(average)
        return model

    return parallelize


class _Before(nn.Module):
    """Calls a function of the rank before the model."""

    def __init__(self, model, act):
        super().__init__()
        self.model, self.act = model, act

    def forward(self, x):
        self.act(dist.get_rank())
        return self.model(x)


def acting(act):
    return lambda model, mesh: _Before(model, act)


def wait_on_rank_zero(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))


def raise_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("no first layer here")
    dist.all_reduce(torch.ones(1))


def die_on_rank_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.ones(1))


class MissingReduction(nn.Module):
    """A row-parallel layer by hand: each rank has columns of the weight, and the partial sums are not added."""

    def __init__(self, layer, mesh, *, reduces: bool):
        super().__init__()
        rank, world = mesh.get_rank(), mesh.size()
        self.weight = nn.Parameter(layer.weight.detach().chunk(world, 1)[rank].clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.rank, self.world, self.reduces = rank, world, reduces

    def forward(self, x):
        partial = CopyToRanks.apply(x).chunk(self.world, -1)[self.rank] @ self.weight.T
        return (SumOverRanks.apply(partial) if self.reduces else partial) + self.bias


class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def row_parallel(*, reduces: bool):
    def parallelize(model, mesh):
        model[2] = MissingReduction(model[2], mesh, reduces=reduces)
        return model

    return parallelize


def all_inputs(inputs, rank, world):
    return inputs
