"""``dist.all_reduce`` of a value that requires a gradient: autograd does not see it, and its backward is the identity.

lucidrains/vector-quantize-pytorch 158 (the codebook entropy), Dao-AILab/flash-attention 1244.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import SumBoth, samples


class Model(nn.Module):
    """The entropy of the mean assignment of samples to codes, which is a quantity of the whole batch."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.is_parallel = False
        self.fc1 = nn.Linear(6, 8)
        self.codes = nn.Linear(8, 5)

    def forward(self, x, labels):
        mean = torch.softmax(self.codes(torch.tanh(self.fc1(x))), -1).mean(0)
        if self.is_parallel and self.wrong:
            mean = mean.clone()
            dist.all_reduce(mean)
        elif self.is_parallel:
            mean = SumBoth.apply(mean)
        mean = mean / (dist.get_world_size() if self.is_parallel else 1)
        return (mean * (mean + 1e-3).log()).sum()


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


def parallelize(model, mesh):
    model.is_parallel = True
    return DistributedDataParallel(model)
