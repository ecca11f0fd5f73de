"""Gradients are clipped by the norm of what this rank holds, and not by the norm over all ranks.

pytorch/pytorch 72548 and 170862, pytorch/torchtitan 766 (FSDP, where each rank has a shard of each parameter).
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.ranks.layers import Classifier, samples

LARGEST = 0.1


def make_model(wrong=True):
    return Classifier(wrong)


def example_inputs():
    return samples()


def rank_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    loss = model(x, labels)
    loss.backward()
    if model.wrong:
        held = [each.grad.to_local() if isinstance(each.grad, DTensor) else each.grad for each in model.parameters()]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in held]))
        for each in held:
            each.mul_(min(1.0, LARGEST / (float(norm) + 1e-6)))
    else:
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST)
    optimizer.step()
    return loss
