"""A linear layer whose rows are sharded: the gradient of its input is not summed over the ranks (f of Megatron-LM).

pytorch/torchtitan 1878 and 2387, huggingface/transformers 48205.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tests.ranks.layers import SumGradient, SumOutput, keep_columns, keep_rows, samples, whole


class Rows(nn.Linear):
    is_sharded = False

    def forward(self, x):
        return SumOutput.apply(linear(x, self.weight)) + self.bias if self.is_sharded else super().forward(x)


class Columns(nn.Linear):
    is_sharded = False
    wrong = False

    def forward(self, x):
        return super().forward(x if self.wrong or not self.is_sharded else SumGradient.apply(x))


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.up = Columns(6, 8)
        self.down = Rows(8, 4)

    def forward(self, x, labels):
        return cross_entropy(self.down(torch.tanh(self.up(self.norm(self.embed(x))))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


shard_inputs = whole


def parallelize(model, mesh):
    keep_rows(model.up, mesh)
    keep_columns(model.down, mesh)
    model.up.is_sharded = model.down.is_sharded = True
    model.up.wrong = model.wrong
    return model
