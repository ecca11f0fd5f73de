"""Tensor parallelism: the ranks draw other dropout masks for an activation that each of them has whole.

NVIDIA/Megatron-LM 206 (the generators of the ranks go out of step).
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from tests.ranks.layers import SumGradient, SumOutput, keep_columns, keep_rows, samples, whole


class Rows(nn.Linear):
    is_sharded = False

    def forward(self, x):
        return SumOutput.apply(linear(x, self.weight)) + self.bias if self.is_sharded else super().forward(x)


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.dropout = nn.Dropout(0.5)
        self.enter = nn.Identity()
        self.up = nn.Linear(6, 8)
        self.down = Rows(8, 4)

    def forward(self, x, labels):
        return cross_entropy(self.down(torch.tanh(self.up(self.enter(self.dropout(x))))), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


shard_inputs = whole


def parallelize(model, mesh):
    keep_rows(model.up, mesh)
    keep_columns(model.down, mesh)
    model.down.is_sharded = True
    model.enter.register_forward_hook(lambda module, args, output: SumGradient.apply(output))
    if model.wrong:
        rank = mesh.get_local_rank()
        model.register_forward_pre_hook(lambda module, args: torch.manual_seed(100 + rank) and None)
    return model
