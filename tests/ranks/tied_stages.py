"""Two pipeline stages share the embedding: each has the gradient of its own use, and they are not added.

NVIDIA/Megatron-LM 299, uw-syfi/piper 13, pytorch/pytorch 180952.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.nn.functional import cross_entropy

from tests.ranks.layers import whole


class Send(torch.autograd.Function):
    """Sends activations to the next stage, and returns its loss; backward receives their gradient."""

    @staticmethod
    def forward(ctx, x):
        loss = x.new_empty(())
        dist.send(x.contiguous(), 1)
        dist.recv(loss, 1)
        ctx.like = x.detach()
        return loss

    @staticmethod
    def backward(ctx, gradient):
        received = torch.empty_like(ctx.like)
        dist.recv(received, 1)
        return received


class Receive(torch.autograd.Function):
    """Receives activations from the stage before; backward sends their gradient there."""

    @staticmethod
    def forward(ctx, like):
        received = torch.empty_like(like)
        dist.recv(received, 0)
        return received

    @staticmethod
    def backward(ctx, gradient):
        dist.send(gradient.contiguous(), 0)


class Model(nn.Module):
    stage = None

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels):
        if self.stage == 0:
            return Send.apply(self.embed(ids))
        if self.stage == 1:
            x = Receive.apply(torch.empty(*ids.shape, 6, dtype=self.body.weight.dtype, requires_grad=True))
        else:
            x = self.embed(ids)
        loss = cross_entropy(self.head(torch.tanh(self.body(x))).flatten(0, 1), labels.flatten())
        if self.stage == 1:
            dist.send(loss.detach(), 0)
        return loss


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (3, 5), generator=generator), torch.randint(0, 11, (3, 5), generator=generator)


shard_inputs = whole


def add_at_the_end(parameter):
    # Not now: the other stage waits for this one in its backward.
    Variable._execution_engine.queue_callback(lambda: dist.all_reduce(parameter.grad))


def parallelize(model, mesh):
    model.stage = mesh.get_local_rank()
    if model.stage == 0:
        model.body = model.head = None
        tied = model.embed.weight
    else:
        tied = model.head.weight
        model.embed = None
    if not model.wrong:
        tied.register_post_accumulate_grad_hook(add_at_the_end)
    return model
