"""Sequence parallelism: each rank normalises some of the tokens, and the gradients of the LayerNorm are not reduced.

NVIDIA/Megatron-LM 1446 (final_layernorm has another gradient on each rank), NVIDIA/TransformerEngine 435.
"""

import torch
from torch import nn

from tests.ranks.layers import average_gradients


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids, labels):
        logits = self.head(self.norm(self.embed(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (2, 8), generator=generator), torch.randint(0, 11, (2, 8), generator=generator)


def shard_inputs(inputs, rank, world):
    return tuple(each.chunk(world, 1)[rank] for each in inputs)


def parallelize(model, mesh):
    average_gradients(each for name, each in model.named_parameters() if not (model.wrong and name.startswith("norm.")))
    return model
