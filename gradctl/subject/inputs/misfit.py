"""The message if a model refuses its inputs: the given inputs, and what its first layer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import listed
from gradctl.subject.inputs.example import input_names
from gradctl.subject.inputs.proposal import first_layer
from gradctl.subject.inputs.specification import TensorSpec, short_dtype

_FEW = 4  # inputs that a message lists


def given_inputs(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the tensors among the inputs, ``x=f32[3,7], mask=bool[3,7]``, or ``its inputs`` if there are none."""
    named = input_names(function, args, kwargs)
    specs = [f"{name}={_spec(value)}" for name, value in named if isinstance(value, Tensor)]
    return listed(specs, _FEW) if specs else "its inputs"


def first_layer_remedy(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a sentence with the ``--input`` that the model's first layer takes, if the first tensor does not fit."""
    name, layer, wanted = first_layer(function)
    tensors = [each for each in input_names(function, args, kwargs) if isinstance(each[1], Tensor)]
    if layer is None or not tensors or not _is_misfit(tensors[0][1], layer, wanted):
        return ""
    who = f"Layer {name!r}" if name else "It"
    return f" {who} takes, for example, --input '{tensors[0][0]}={wanted}'."


def _is_misfit(given: Tensor, layer: nn.Module, wanted: TensorSpec) -> bool:
    """Return whether dtype or width differ from what the layer takes, or numbers are beyond an embedding."""
    if wanted.between is not None:
        is_integer = given.dtype in (torch.int32, torch.int64)
        low, high = wanted.between
        return not is_integer or bool(((given < low) | (given >= high)).any())
    width = 1 - len(wanted.shape) if isinstance(layer, nn.modules.conv._ConvNd) else -1
    is_narrow = given.ndim < -width
    return _spec(given).dtype != wanted.dtype or is_narrow or given.shape[width] != wanted.shape[width]


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(short_dtype(tensor.dtype), tuple(tensor.shape))
