"""BatchNorm computes its statistics from the samples of its rank, where synchronised statistics are meant.

facebookresearch/detectron2 5409, ptrblck/pytorch_misc 5. The right twin has layers without statistics of the batch.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import samples


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if wrong else nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x, labels):
        return cross_entropy(self.fc2(torch.tanh(self.norm(self.fc1(x)))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


def parallelize(model, mesh):
    return DistributedDataParallel(model)
