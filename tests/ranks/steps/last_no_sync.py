"""Two micro-batches with DDP: ``no_sync`` is entered around the last of them, too, so that no gradient is reduced.

huggingface/accelerate 1726, facebookresearch/ClassyVision 706.
"""

from contextlib import nullcontext

from tests.ranks.layers import Classifier, samples


def make_model(wrong=True):
    return Classifier(wrong)


def example_inputs():
    return samples()


def rank_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    parts = list(zip(x.chunk(2), labels.chunk(2), strict=True))
    total = 0.0
    for number, part in enumerate(parts):
        is_wrapped = hasattr(model, "no_sync")
        is_last = number == len(parts) - 1
        wrong = model.module.wrong if is_wrapped else model.wrong
        with model.no_sync() if is_wrapped and (wrong or not is_last) else nullcontext():
            loss = model(*part) / len(parts)
            loss.backward()
        total += loss.detach()
    optimizer.step()
    return total
