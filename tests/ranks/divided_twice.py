"""A communication hook of DDP divides the averaged gradient by the world size once more.

meta-pytorch/torchtune 2172, deepspeedai/DeepSpeed 7718 (the loss is equal, the norm of the gradient a third).
"""

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import Classifier, samples


def make_model(wrong=True):
    return Classifier(wrong)


def example_inputs():
    return samples()


def divided_again(state, bucket):
    return allreduce_hook(state, bucket).then(lambda future: future.value() / dist.get_world_size())


def parallelize(model, mesh):
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, divided_again if model.wrong else allreduce_hook)
    return wrapped
