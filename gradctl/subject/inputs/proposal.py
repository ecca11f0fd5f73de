"""The line to type if inputs are missing, guessed from the model's first layer and the names its forward takes."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradctl.core.errors import TargetError
from gradctl.core.names import DTYPES
from gradctl.core.target_options import TargetOptions
from gradctl.subject.inputs.specification import TensorSpec, short_dtype
from gradctl.subject.signature import VARIADIC, call_signature, callee_name, module_of, required_parameters

# Small, yet with room for three poolings by two and the usual kernels.
_BATCH, _LENGTH, _IMAGE = 8, 16, {1: (64,), 2: (32, 32), 3: (16, 16, 16)}
_UNKNOWN = TensorSpec("f32", (8, 8))
_PLAIN = {int: "1", float: "1.0", bool: "True", str: "'text'"}

Guess = Callable[[Any], TensorSpec]


def no_inputs(model: Callable[..., Any], options: TargetOptions) -> TargetError:
    """Return GC107 with the line to type: what was given, and the inputs that ``model`` probably takes."""
    # Always in quotes, since brackets are patterns of a shell.
    quoted = (shlex.quote(spec) if "'" in spec else f"'{spec}'" for spec in proposed_inputs(model))
    specs = " ".join(f"--input {spec}" for spec in quoted)
    given = [options.target, *(f"--arg={text}" for text in options.arguments)]
    given += [f"--weights={options.weights}"] if options.weights else []
    line = " ".join(["gradctl", options.command, *map(shlex.quote, given), specs])
    is_module = isinstance(model, nn.Module)
    name = callee_name(model)
    beside = "example_inputs()" if is_module else f"{name.partition('.')[0]}_inputs()"
    factory = "" if is_module or "." in name else f" If {name} returns a model, pass its arguments with --arg."
    return TargetError(
        "GC107",
        f"{options.target} has no inputs. Define {beside} next to it, or adapt this to your data: {line}.{factory}",
    )


def proposed_inputs(model: Callable[..., Any]) -> list[str]:
    """Return an ``--input`` for each parameter that ``model`` needs, or for its first if it needs none."""
    signature = call_signature(model)
    if signature is None:
        return [str(_UNKNOWN)]
    named = [parameter for parameter in signature.parameters.values() if parameter.kind not in VARIADIC]
    needed = required_parameters(signature) or named[:1]
    return [proposed_input(model, parameter) for parameter in needed] or [str(first_layer(model)[2])]


def proposed_input(model: Callable[..., Any], parameter: inspect.Parameter) -> str:
    """Return an ``--input`` for one parameter: ``x=f32[8,784]``, ``mask=bool[8,784]``, ``n=1``."""
    annotation = parameter.annotation
    plain = next((text for kind, text in _PLAIN.items() if annotation in (kind, kind.__name__)), None)
    if plain is not None:
        return f"{parameter.name}={plain}"
    spec = first_layer(model)[2]
    if "mask" in parameter.name:
        spec = TensorSpec("bool", spec.shape)
    return f"{parameter.name}={spec}"


def first_layer(model: Callable[..., Any]) -> tuple[str, nn.Module | None, TensorSpec]:
    """Return name and module of the first layer that has a width of its own, in order of definition, and what it takes.

    The layer is None if there is no such layer; then the input is a default guess.
    """
    owner = module_of(model)
    for name, module in owner.named_modules() if owner is not None else ():
        for kind, guess in _GUESSES.items():
            if isinstance(module, kind):
                spec = guess(module)
                if 0 not in spec.shape:  # a lazy layer does not know yet
                    return name, module, spec
    return "", None, _UNKNOWN


def _image(layer: Any) -> TensorSpec:
    sizes = zip(_IMAGE[len(layer.kernel_size)], layer.kernel_size, strict=True)
    return TensorSpec(_dtype(layer), (4, layer.in_channels, *(max(size, kernel) for size, kernel in sizes)))


def _sequence(layer: Any) -> TensorSpec:
    lengths = (_BATCH, _LENGTH) if layer.batch_first else (_LENGTH, _BATCH)
    width = layer.input_size if isinstance(layer, nn.RNNBase) else layer.embed_dim
    return TensorSpec(_dtype(layer), (*lengths, width))


_GUESSES: dict[Any, Guess] = {
    (nn.Embedding, nn.EmbeddingBag): lambda layer: TensorSpec("i64", (_BATCH, _LENGTH), (0, layer.num_embeddings)),
    (nn.RNNBase, nn.MultiheadAttention): _sequence,
    nn.Linear: lambda layer: TensorSpec(_dtype(layer), (_BATCH, layer.in_features)),
    nn.Bilinear: lambda layer: TensorSpec(_dtype(layer), (_BATCH, layer.in1_features)),
    nn.RNNCellBase: lambda layer: TensorSpec(_dtype(layer), (_BATCH, layer.input_size)),
    nn.modules.conv._ConvNd: _image,
}


def _dtype(layer: nn.Module) -> str:
    """Return the short name of the dtype that a layer computes in."""
    short = short_dtype(next((parameter.dtype for parameter in layer.parameters()), torch.float32))
    return short if short in DTYPES else "f32"
