"""A function run by torch with our decompositions in place of its operators, and as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["assert_as_torch"]


class _Substituting(TorchDispatchMode):
    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table, self.used = table, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.table:
            found = self.table[func](*args, **(kwargs or {}))
            if found is not NotImplemented:
                self.used.add(func.__name__.split(".")[0])
                return found
        return func(*args, **(kwargs or {}))


def assert_as_torch(
    table: Mapping[Any, Callable[..., Any]], used: set[str], function: Callable[..., Any], *inputs: Tensor
) -> None:
    """Assert that outputs and gradients with ``table`` are those without, and that ``used`` were replaced by it."""
    substituting = _Substituting(table)
    found = _outputs_and_gradients(function, inputs, substituting)
    assert used <= substituting.used
    for ours, torchs in zip(found, _outputs_and_gradients(function, inputs, nullcontext()), strict=True):
        # Sums in another order: some 1e-15 in float64.
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def _outputs_and_gradients(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], mode: AbstractContextManager[Any]
) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
    with mode:
        found = function(*leaves)
        outputs = list(found) if isinstance(found, tuple) else [found]
        asking = [each for each in outputs if each.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in asking]
        gradients = torch.autograd.grad(asking, [each for each in leaves if each.requires_grad], cotangents)
    return [each.detach() for each in (*outputs, *gradients)]
