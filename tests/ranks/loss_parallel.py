"""A log_softmax over sharded classes: the forward is right, and the backward is that of each rank's classes alone.

pytorch/pytorch 190746 (``loss_parallel``), NVIDIA/Megatron-LM 7452.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear

from tests.ranks.layers import SumGradient, SumOutput, keep_rows, whole


class ShardedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, wrong):
        largest = logits.amax(-1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        total = (logits - largest).exp().sum(-1, keepdim=True)
        dist.all_reduce(total)
        output = logits - largest - total.log()
        ctx.save_for_backward(output)
        ctx.wrong = wrong
        return output

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        total = gradient.sum(-1, keepdim=True)
        if not ctx.wrong:
            dist.all_reduce(total)
        return gradient - output.exp() * total, None


class Head(nn.Linear):
    is_sharded = False
    wrong = False

    def forward(self, x):
        if not self.is_sharded:
            return torch.log_softmax(super().forward(x), -1)
        return ShardedLogSoftmax.apply(linear(SumGradient.apply(x), self.weight, self.bias), self.wrong)


class Model(nn.Module):
    """The mean of log-probabilities, weighted by class, as in preference optimisation."""

    classes = slice(None)

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.embed = nn.Linear(6, 6)
        self.head = Head(6, 8)

    def forward(self, x, weights):
        log_probabilities = self.head(torch.tanh(self.embed(x)))
        if self.head.is_sharded:
            weights = SumGradient.apply(weights)[:, self.classes]
        loss = (log_probabilities * weights).sum(-1).mean()
        return SumOutput.apply(loss) if self.head.is_sharded else loss


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.rand(8, 8, generator=generator)


shard_inputs = whole


def parallelize(model, mesh):
    keep_rows(model.head, mesh)
    model.head.is_sharded, model.head.wrong = True, model.wrong
    own = 8 // mesh.size()
    model.classes = slice(mesh.get_local_rank() * own, (mesh.get_local_rank() + 1) * own)
    return model
