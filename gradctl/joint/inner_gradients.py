"""Models that differentiate in their forward (forces, guidance, gradient penalties), as a graph of operators.

``torch.export`` rejects them. Autograd runs while a joint program is traced, so that trace has their inner backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradctl.joint.capture import Joint
from gradctl.joint.export_error import JointExportError
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.signature import module_of
from gradctl.subject.torch_private import current_autograd_node
from gradctl.subject.tree import map_leaves
from gradctl.tracing.operators import OperatorMode


class _Backward(OperatorMode):
    """Note whether autograd's engine calls an operator, or one is called in forward mode."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_run: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        self.is_run |= current_autograd_node() is not None or forward_ad._current_level >= 0
        return func(*args, **(kwargs or {}))


def differentiates_inside(instance: Instance) -> bool:
    """Return whether the forward of a model runs a backward or forward-mode differentiation.

    The private copy is called once, and restored. A model that rejects a dispatch mode counts as one that does not.
    """
    instance.restore()
    args, kwargs = instance.inputs()
    watch = _Backward()
    with suppress(Exception), instance.preserve_leaves(), torch.enable_grad(), watch:
        instance.model(*args, **kwargs)
    instance.restore()
    return watch.is_run


def replay(joint: Joint, instance: Instance, structure: Any) -> Callable[..., Any]:
    """Return a function of the model's inputs that runs its traced forward on the present parameters and buffers.

    Args:
        joint: the forward alone, of ``instance``.
        instance: the private copy, whose buffers the function updates as the forward does.
        structure: an output of the model; a tensor that requires no gradient in it requires none in the result.

    Raises:
        JointExportError: the forward draws random numbers, which are inputs of a joint program.
    """
    if joint.random_inputs:
        raise JointExportError(
            f"it draws random numbers ({next(iter(joint.random_inputs))}): draw them outside, and pass them as an "
            "input."
        )
    graph = joint.program.module(check_guards=False)
    module, model = module_of(instance.model), instance.subject.model
    count = len(joint.outputs) - sum(name.startswith("updated.") for name in joint.outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())} if module is not None else {}
        given = [value for _, value in input_names(model, args, kwargs) if isinstance(value, Tensor)]
        found = graph(*state.values(), *given)
        for name, value in zip(joint.outputs[count:], found[count:], strict=True):
            state[name.removeprefix("updated.")].copy_(value.detach())
        outputs = iter(found[:count])

        def replaced(_: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return next(outputs) if leaf.requires_grad else next(outputs).detach()

        return map_leaves(replaced, structure)

    return forward
