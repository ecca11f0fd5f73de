"""A sum over the ranks whose backward is a sum, too, where each rank has the same loss: its gradients are doubled.

pytorch/pytorch 58005 (``torch.distributed.nn.all_reduce``), pytorch/xla 2989, pytorch/pytorch 160285.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tests.ranks.layers import SumBoth, SumGradient, SumOutput, keep_columns, keep_rows, samples, whole


class Rows(nn.Linear):
    is_sharded = False
    wrong = False

    def forward(self, x):
        if not self.is_sharded:
            return super().forward(x)
        return (SumBoth if self.wrong else SumOutput).apply(linear(x, self.weight)) + self.bias


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.enter = nn.Identity()
        self.embed = nn.Linear(6, 6)
        self.up = nn.Linear(6, 8)
        self.down = Rows(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x, labels):
        hidden = torch.tanh(self.up(self.enter(torch.tanh(self.embed(x)))))
        return cross_entropy(self.head(torch.tanh(self.down(hidden))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


shard_inputs = whole


def parallelize(model, mesh):
    keep_rows(model.up, mesh)
    keep_columns(model.down, mesh)
    model.down.is_sharded, model.down.wrong = True, model.wrong
    model.enter.register_forward_hook(lambda module, args, output: SumGradient.apply(output))
    return model
