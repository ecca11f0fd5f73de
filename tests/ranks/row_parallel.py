"""A linear layer whose columns are sharded: its partial outputs are not summed over the ranks.

pytorch/torchtitan 1805 (a missing reduction of a partial sum).
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tests.ranks.layers import SumGradient, SumOutput, keep_columns, keep_rows, samples, whole


class Rows(nn.Linear):
    is_sharded = False
    wrong = False

    def forward(self, x):
        if not self.is_sharded:
            return super().forward(x)
        partial = linear(x, self.weight)
        return (partial if self.wrong else SumOutput.apply(partial)) + self.bias


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.up = nn.Linear(6, 8)
        self.down = Rows(8, 6)
        self.head = nn.Linear(6, 4)
        self.enter = nn.Identity()

    def forward(self, x, labels):
        return cross_entropy(self.head(torch.tanh(self.down(torch.tanh(self.up(self.enter(x)))))), labels)


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
