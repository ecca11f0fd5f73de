"""Gradients are summed over the ranks, and not divided by their number; each loss is the mean of its own samples.

pytorch/torchtitan 2318 (gradient norms of DDP and FSDP differ by the number of ranks).
"""

from tests.ranks.layers import Classifier, average_gradients, samples, sum_gradients


def make_model(wrong=True):
    return Classifier(wrong)


def example_inputs():
    return samples()


def parallelize(model, mesh):
    (sum_gradients if model.wrong else average_gradients)(model.parameters())
    return model
