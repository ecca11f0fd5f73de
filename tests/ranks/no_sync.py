"""``no_sync`` is entered around the last micro-batch, too: no gradient is reduced.

huggingface/accelerate 1726, pytorch/pytorch 69031.
"""

from torch.nn.parallel import DistributedDataParallel

from tests.ranks.layers import Classifier, samples


def make_model(wrong=True):
    return Classifier(wrong)


def example_inputs():
    return samples()


class NeverSynchronised(DistributedDataParallel):
    def forward(self, *args):
        with self.no_sync():
            return super().forward(*args)


def parallelize(model, mesh):
    return (NeverSynchronised if model.wrong else DistributedDataParallel)(model)
