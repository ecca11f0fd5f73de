"""A contrastive loss over the features of all ranks, which ``dist.all_gather`` collects without their gradient.

pytorch/pytorch 120386, mlfoundations/open_clip 616 (``gather_with_grad``).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import Gather


class Model(nn.Module):
    """The mean over images of the loss of their own text among the texts of the whole batch."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.is_parallel = False
        self.image = nn.Linear(6, 5)
        self.text = nn.Linear(4, 5)

    def forward(self, images, texts):
        image, text = normalize(self.image(images), dim=-1), normalize(self.text(texts), dim=-1)
        first = 0
        if self.is_parallel:
            first = dist.get_rank() * len(text)
            text = self.gather(text)
        return cross_entropy(4 * image @ text.T, torch.arange(first, first + len(image)))

    def gather(self, text):
        if not self.wrong:
            return Gather.apply(text, 0)
        parts = [torch.empty_like(text) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, text)
        parts[dist.get_rank()] = text
        return torch.cat(parts)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)


def parallelize(model, mesh):
    model.is_parallel = True
    return DistributedDataParallel(model)
