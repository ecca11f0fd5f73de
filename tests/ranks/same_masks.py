"""Data parallelism: each rank seeds its generator alike, so that all draw the same dropout masks.

tenstorrent/tt-metal 55947.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import samples


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.fc1 = nn.Linear(6, 8)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x, labels):
        return cross_entropy(self.fc2(self.dropout(torch.tanh(self.fc1(x)))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


def parallelize(model, mesh):
    seed = 7 if model.wrong else 7 + mesh.get_local_rank()
    model.register_forward_pre_hook(lambda module, args: torch.manual_seed(seed) and None)
    return DistributedDataParallel(model)
