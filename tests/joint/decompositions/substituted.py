"""A function run with the decompositions in place of torch's operators, and with torch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions import EARLY, TABLE
from gradctl.subject.subject import Subject

__all__ = ["Substituting", "assert_as_torch", "assert_right_in_onnxruntime", "values"]

_EVERY = {**TABLE, **EARLY}


def values(*shape: int, seed: int = 0) -> Tensor:
    """Return float64 values of the normal distribution."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Substituting(TorchDispatchMode):
    """Run decompositions in place of operators; ``used`` has the names of these."""

    def __init__(self) -> None:
        super().__init__()
        self.used = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _EVERY:
            found = _EVERY[func](*args, **(kwargs or {}))
            if found is not NotImplemented:
                self.used.add(func.__name__.split(".")[0])
                return found
        return func(*args, **(kwargs or {}))


def assert_as_torch(used: set[str], function: Callable[..., Any], *inputs: Tensor) -> None:
    """Assert that outputs and gradients with decompositions are torch's, and that the operators ``used`` have them."""
    substituting = Substituting()
    found = _outputs_and_gradients(function, inputs, substituting)
    assert used <= substituting.used
    for ours, torchs in zip(found, _outputs_and_gradients(function, inputs, nullcontext()), strict=True):
        # Sums in another order: some 1e-15 in float64.
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def assert_right_in_onnxruntime(model: Callable[..., Any], *inputs: Any) -> None:
    """Assert that outputs and gradients of the joint graph of a model are those of eager."""
    unit = Comparing(Subject(target="test", model=model, args=inputs), Allows(())).form("onnx-joint", named=True)
    assert (unit.verdict, unit.reason) == ("pass", None), (unit.details, unit.findings)


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
