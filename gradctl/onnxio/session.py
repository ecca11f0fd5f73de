"""Run a session of onnxruntime on torch tensors; describe its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from gradctl.onnxio.onnx_file import OnnxFile, onnx_dtype_name, onnxruntime_message, session

# A runtime that has loaded a file: from inputs by name to outputs by name.
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def load(file: OnnxFile, provider: str | None = None, *, optimised: bool = True) -> Run:
    """Return a file in onnxruntime; arguments and errors are those of ``session``."""
    return partial(run, session(file, optimised=optimised, provider=provider))


def run(running: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a session's outputs by name.

    Raises:
        RuntimeError: onnxruntime rejects the inputs, or an output is not a tensor.
    """
    names = [each.name for each in running.get_outputs()]
    try:
        values = running.run(names, {name: as_numpy(tensor) for name, tensor in feeds.items()})
    except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
        raise RuntimeError(f"onnxruntime: {onnxruntime_message(error)}") from error
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray | np.generic):
            raise RuntimeError(f"output {name!r} is a {type(value).__name__}, not a tensor")
    return {name: torch.from_numpy(np.array(value)) for name, value in zip(names, values, strict=True)}


def axis_size(dimension: onnx.TensorShapeProto.Dimension) -> int | str:
    """Return a size as a number, or the name of a symbolic one, or ``?``."""
    if dimension.HasField("dim_value") and dimension.dim_value >= 0:
        return int(dimension.dim_value)
    return dimension.dim_param or "?"


def describe_port(port: onnx.ValueInfoProto) -> tuple[str, list[int | str] | None]:
    """Return the dtype of an input or output, and its sizes: a number, a name, or ``?``; None if the rank is unknown.

    If it is not a tensor, the dtype is the name of its kind (``sequence_type``). A negative size is symbolic, as in
    onnxruntime.
    """
    if port.type.WhichOneof("value") != "tensor_type":
        return str(port.type.WhichOneof("value")), None
    kind = port.type.tensor_type
    sizes = [axis_size(each) for each in kind.shape.dim]
    return onnx_dtype_name(kind.elem_type), sizes if kind.HasField("shape") else None


def port_text(port: onnx.ValueInfoProto) -> str:
    """Return the type of an input or output: ``float32[batch, 16]``."""
    dtype, sizes = describe_port(port)
    return dtype if sizes is None else f"{dtype}[{', '.join(map(str, sizes))}]"


def static_shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """Return the shape of a value; None if it is unknown or has symbolic sizes."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not size.HasField("dim_value") for size in kind.shape.dim):
        return None
    return tuple(size.dim_value for size in kind.shape.dim)


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the tensor as an array for onnxruntime."""
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array
