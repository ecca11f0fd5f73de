"""The head is applied outside of what DDP wraps, so that nothing reduces its gradient.

k2-fsa/icefall 226, pytorch/pytorch 69031.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import average_gradients, samples


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.backbone = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x, labels):
        return cross_entropy(self.head(torch.tanh(self.backbone(x))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


def parallelize(model, mesh):
    model.backbone = DistributedDataParallel(model.backbone)
    if not model.wrong:
        average_gradients(model.head.parameters())
    return model
