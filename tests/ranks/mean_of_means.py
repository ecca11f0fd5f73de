"""Each rank divides its loss by its own number of tokens: the mean of the means is not the mean over all tokens.

huggingface/transformers 34242, verl-project/verl 5625.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

IGNORED = -100


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.is_global = False

    def forward(self, ids, labels):
        logits = self.head(torch.tanh(self.embed(ids)))
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum()
        if self.is_global:
            dist.all_reduce(count)
            return total / count * dist.get_world_size()
        return total / count


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (4, 6), generator=generator)
    labels = torch.randint(0, 11, (4, 6), generator=generator)
    for row, length in enumerate((6, 5, 2, 1)):
        labels[row, length:] = IGNORED
    return ids, labels


def parallelize(model, mesh):
    model.is_global = not model.wrong
    return DistributedDataParallel(model)
