"""The backward of attention over a sequence shard uses the rank's own keys and values only; the forward is right.

huggingface/diffusers 14265 (ring attention), NVIDIA/Megatron-LM 1464.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.ranks.layers import Gather, average_gradients


class StaleGather(torch.autograd.Function):
    """The rows of all ranks; backward keeps the gradient that this rank has for its own rows."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size(), 1)[dist.get_rank()]


class Attention(nn.Module):
    is_sharded = False
    wrong = False

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.is_sharded:
            key, value = (StaleGather.apply(each) if self.wrong else Gather.apply(each, 1) for each in (key, value))
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
    model.attention.is_sharded, model.attention.wrong = True, model.wrong
    average_gradients(model.parameters())
    return model
