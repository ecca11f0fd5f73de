"""Data parallelism by hand, in which the gradient of one parameter is not reduced over the ranks.

``gradctl compare sample_models/missing_reduction.py --form ranks:2`` fails: hooks average the gradients of weights over
the ranks, and the bias was forgotten. Its gradient on each rank is that of this rank's share of the batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(4, 4, generator=torch.Generator().manual_seed(1)),)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    def average(parameter: Tensor) -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= mesh.size()

    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.register_post_accumulate_grad_hook(average)
    return model
