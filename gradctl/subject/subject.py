"""The subject of a check: the user's model with its inputs, as loaded. It is never changed; runs are made on copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.autograd import Function

from gradctl.core.findings import Finding

# How the model runs on many ranks, as its file may say: ``parallelize(model, mesh) -> model``,
# ``shard_inputs(inputs, rank, world) -> inputs``, ``gather(name, parts) -> tensor``, the plan of tensor parallelism,
# and whether the losses of the ranks are averaged ("mean") or summed ("sum").
OF_RANKS = ("parallelize", "shard_inputs", "gather", "tp_plan", "loss_reduction", "rank_step")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and one set of inputs.

    Attributes:
        target: how the user named it, for example ``net.py:make_model``.
        model: an ``nn.Module``, a plain function of tensors, or the ``apply`` of an ``autograd.Function``.
        args: positional inputs; tensors may be nested in tuples, lists, mappings and dataclasses.
        kwargs: keyword inputs.
        function: the Function class, when the target is one.
        loss: ``loss(outputs)`` or ``loss(outputs, *args, **kwargs)`` to a scalar; None takes random cotangents.
        seed: for every random generator, set anew before each call.
        notes: what was noted while loading (a model in training mode, for example).
        inputs_beside: name and object of the source of the inputs beside the target, which may be a function of sizes.
        beside: what the target's file says about ranks, by the names in ``OF_RANKS``.
        provider: execution provider of onnxruntime, for the forms that run in it; None for the CPU's.
    """

    target: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    function: type[Function] | None = None
    loss: Callable[..., Any] | None = None
    seed: int = 0
    notes: tuple[Finding, ...] = ()
    inputs_beside: tuple[str, Any] | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    provider: str | None = None

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is a module."""
        return self.model if isinstance(self.model, nn.Module) else None
