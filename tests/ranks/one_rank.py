"""The gradient of the scale is reduced to rank 0 (``reduce``), whose optimizer alone makes the right step.

pytorch/pytorch 88621 and NVIDIA/Megatron-LM 1446: a replicated parameter has another gradient on each rank.
"""

import torch
import torch.distributed as dist
from torch import nn

from tests.ranks.layers import Classifier, average_gradients, samples


class Model(Classifier):
    def __init__(self, wrong):
        super().__init__(wrong)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x, labels):
        return super().forward(x * self.scale, labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


def to_rank_zero(parameter):
    parameter.grad /= dist.get_world_size()
    dist.reduce(parameter.grad, dst=0)


def parallelize(model, mesh):
    average_gradients(each for name, each in model.named_parameters() if name != "scale" or not model.wrong)
    if model.wrong:
        model.scale.register_post_accumulate_grad_hook(to_rank_zero)
    return model
