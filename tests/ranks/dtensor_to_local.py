"""``to_local()`` of a replicated DTensor without ``grad_placements``: the partial gradients are taken as complete.

pytorch/torchtitan 1805 and 2387 (experts and router of a mixture of experts under tensor parallelism).
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from tests.ranks.layers import SumGradient, SumOutput, samples, whole


class Experts(nn.Module):
    mesh = None
    wrong = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 4))

    def forward(self, scores, x):
        if self.mesh is None:
            return torch.einsum("be,bi,eio->bo", scores, x, self.weight)
        whole_scores = DTensor.from_local(scores, self.mesh, [Replicate()], run_check=False)
        local = whole_scores.to_local(grad_placements=None if self.wrong else [Partial()])
        own = local.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()]
        return SumOutput.apply(torch.einsum("be,bi,eio->bo", own, SumGradient.apply(x), self.weight.to_local()))


class Model(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.router = nn.Linear(6, 4)
        self.experts = Experts()

    def forward(self, x, labels):
        return cross_entropy(self.experts(torch.softmax(self.router(x), -1), x), labels)


def make_model(wrong=True):
    return Model(wrong)


def example_inputs():
    return samples()


shard_inputs = whole


def parallelize(model, mesh):
    weight = distribute_tensor(model.experts.weight.detach(), mesh, [Shard(0)])
    model.experts.weight = nn.Parameter(weight)
    model.experts.mesh, model.experts.wrong = mesh, model.wrong
    return model
