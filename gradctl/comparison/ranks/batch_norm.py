"""Batch normalisation as data parallelism computes it: each rank has the statistics of its own share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.subject.torch_private import patched


def normalises_shares(model: Any) -> bool:
    """Return whether a model has batch normalisation that uses the statistics of the batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(each, kinds) and (each.training or each.running_mean is None) for each in modules)


def batch_norm_of_shares(weights: Sequence[float]) -> AbstractContextManager[None]:
    """Let batch normalisation in one process normalise each share of the batch alone, as ranks do.

    The running statistics are those of the first share: DDP sends the buffers of rank 0 to the others.

    Args:
        weights: the part of the batch that each share is.
    """
    original = torch.nn.functional.batch_norm

    def normalise(  # noqa: PLR0917  # as in torch
        input: Tensor,  # the name in torch
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        sizes = [round(len(input) * each) for each in weights]
        settings = (weight, bias, training, momentum, eps)
        if not training or sum(sizes) != len(input) or not all(sizes):
            return original(input, running_mean, running_var, *settings)
        first, *others = torch.split(input, sizes)
        return torch.cat(
            [
                original(first, running_mean, running_var, *settings),
                *(original(x, None, None, *settings) for x in others),
            ]
        )

    return patched(torch.nn.functional, "batch_norm", normalise)
