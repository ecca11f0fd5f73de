"""``lora:R``: adapters of rank R on linear layers; the other weights frozen, against the same with all of them trained.

A linear layer W gets ``W + B A · alpha / R`` with alpha = 2 R. The optimizer has the adapters alone in both runs, so
that freezing the rest must change nothing. B is random, not zero as usual, so that A has a gradient from the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError
from gradctl.core.names import parameter_name
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import Trainer
from gradctl.training.variants.table import CannotApply

_ALPHA_PER_RANK = 2.0
# Of the modules that are tried one by one, at most.
_MOST_OWNERS = 24
# Of the product B A beside W, whose elements are of the size 1 / sqrt(inputs) at initialisation.
_SIZE = 0.1


def alter(trainer: Trainer, argument: str | None) -> None:
    """Train adapters in a frozen model."""
    plain(trainer, argument)
    for leaf in trainer.instance.leaves:
        for tensor in leaf.sharing if not leaf.name.startswith("input:") else ():
            tensor.requires_grad_(False)


def plain(trainer: Trainer, argument: str | None) -> None:
    """Train adapters in a model whose other weights require gradients as before.

    Raises:
        CannotApply: the model has no linear layer.
    """
    rank = _rank(argument)
    trainer.parameters = {
        parameter_name(f"{name}.{side}"): (adapter,)
        for number, (name, module) in enumerate(linear_layers(trainer.module))
        for side, adapter in _adapt(module, rank, trainer.recipe.subject.seed + number).items()
    }
    if not trainer.parameters:
        raise CannotApply("the model has no linear layer.")
    others = [tensor for leaf in trainer.instance.leaves for tensor in leaf.sharing]

    def step(*args: Any, **kwargs: Any) -> Tensor | None:
        for tensor in others:  # the optimizer does not know them
            tensor.grad = None
        return trainer.plain_step(*args, **kwargs)

    trainer.step = step


def _rank(argument: str | None) -> int:
    if argument is None or not argument.isdigit() or int(argument) < 1:
        raise TargetError("GC145", f"lora takes the rank, at least 1 (lora:4), not {argument!r}.")
    return int(argument)


def linear_layers(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers that are called, by name: ``nn.Linear``, and ``Conv1D`` of transformers.

    ``nn.MultiheadAttention`` reads the weight of its output layer and does not call it.
    """
    for name, module in model.named_modules() if model is not None else ():
        is_read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        is_linear = isinstance(module, nn.Linear) and not is_read
        if (is_linear or type(module).__name__ == "Conv1D") and not _is_lazy(module):
            yield name, module


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module.weight, nn.parameter.UninitializedParameter)


def _adapt(module: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    """Add an adapter to what a linear layer returns; return its two matrices by name."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    rank = min(rank, inputs, outputs)
    down = _drawn((rank, inputs), inputs**-0.5, seed, weight)
    up = _drawn((outputs, rank), _SIZE / _ALPHA_PER_RANK * rank**-0.5, seed + 1, weight)
    module.register_parameter("lora_A", down)
    module.register_parameter("lora_B", up)

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return output + (args[0] @ down.T) @ up.T * _ALPHA_PER_RANK

    module.register_forward_hook(hook)
    return {"lora_A": down, "lora_B": up}


def _drawn(shape: tuple[int, int], size: float, seed: int, like: Tensor) -> nn.Parameter:
    """Return a Gaussian matrix, the same in each dtype but for rounding."""
    values = np.random.RandomState(seed % 2**32).standard_normal(shape) * size
    return nn.Parameter(torch.from_numpy(values).float().to(like))


def experiments(argument: str | None) -> Experiments:
    """Yield the tests of GC438: what, if it is not frozen, brings the gradient of the adapters back."""
    agrees = yield Experiment(
        "GC438",
        lambda: "nothing before the adapters requires a gradient; with embeddings whose output does, they agree",
        "Call enable_input_require_grads() on the model, or checkpoint with use_reentrant=False.",
        _with_outputs_that_require_gradients,
    )
    groups: list[str] = []

    def alter_but(number: int, trainer: Trainer, text: str | None) -> None:
        alter(trainer, text)
        owners = _owners(trainer)
        groups[:] = owners
        for module in list(owners.values())[number]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_()

    number = 0
    while not agrees and number < min(len(groups) or 1, _MOST_OWNERS):
        agrees = yield Experiment(
            "GC438",
            lambda number=number: (  # type: ignore[misc]
                f"the adapters lose their gradient if {groups[number]} is frozen; with it trained, they agree"
            ),
            "Do not let the forward or a backward depend on requires_grad of frozen weights.",
            partial(alter_but, number),
        )
        number += 1


def _owners(trainer: Trainer) -> dict[str, list[nn.Module]]:
    """Return the modules with frozen parameters of their own, those of repeated blocks together (``blocks.*.up``).

    The last are first: a frozen head loses the gradient of the most adapters.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, module in reversed(list(trainer.module.named_modules()) if trainer.module is not None else []):
        if any(not parameter.requires_grad for parameter in module.parameters(recurse=False)):
            found.setdefault(re.sub(r"\b\d+\b", "*", name) or "the model", []).append(module)
    return found


def _with_outputs_that_require_gradients(trainer: Trainer, argument: str | None) -> None:
    """Freeze the model, and let the outputs of its embeddings require a gradient."""
    alter(trainer, argument)
    modules = trainer.module.modules() if trainer.module is not None else ()
    for module in modules:
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, args, output: output.requires_grad_())
