"""Sequence shards: the attention of each rank sees the keys and values of its own tokens only.

pytorch/torchtitan 2532, deepspeedai/DeepSpeed 6841.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.ranks.layers import Gather, average_gradients


class Attention(nn.Module):
    is_sharded = False

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.is_sharded:
            key, value = Gather.apply(key, 1), Gather.apply(value, 1)
        return self.out(scaled_dot_product_attention(query, key, value))


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Embedding(11, 6)
        self.attention = Attention()
        self.head = nn.Linear(6, 11)

    def forward(self, ids, labels):
        x = self.embed(ids)
        logits = self.head(x + self.attention(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (2, 8), generator=generator), torch.randint(0, 11, (2, 8), generator=generator)


def shard_inputs(inputs, rank, world):
    return tuple(each.chunk(world, 1)[rank] for each in inputs)


def parallelize(model, mesh):
    model.attention.is_sharded = not model.wrong
    average_gradients(model.parameters())
    return model
