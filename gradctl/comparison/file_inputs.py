"""What an ONNX file is run on: values of a file, or drawn from the types of the graph's inputs; and more of them.

What a pass or another exporter got wrong may show only beyond the example: at other values, signs, sizes, or at the
ends of what floats are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.target_files import INPUT_SUFFIXES
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import describe_port, port_text, run
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.tensor_file import read_tensors
from gradctl.subject.inputs.variations import redraw

# A size that a file leaves free, and the integers that an input may take: the first that the file runs on.
_FREE_SIZES = (3, 1, 8)
_LARGEST_INTEGERS = (99, 9, 1)
_MOST_ELEMENTS = 2**59  # of 8 bytes, more overflow what torch counts them with

# Sums of a hundred squares of the large value stay finite in each dtype; the small one is below the usual epsilon of a
# norm (1e-5, added to its square), the tiny one vanishes when squared. None is subnormal: an ULP up or
# down would be none of its own.
_LARGE = {torch.float16: 16.0}
_TINY = {torch.float16: 1e-4}


def read_inputs(path: Path, file: OnnxFile) -> dict[str, Tensor]:
    """Return the inputs of a file of tensors, by the names of the graph's inputs.

    Raises:
        TargetError: GC104 if they are not as many, or of other names; GC122 if they cannot be read.
    """
    content = read_tensors(path, INPUT_SUFFIXES, "Save tensors only: in a dict by name, with numpy.savez.")
    names = [each.name for each in file.inputs]
    if isinstance(content, Mapping):
        values, said = _in_order(content, names), ", ".join(map(str, content)) or "nothing"
    else:
        values = [content] if isinstance(content, Tensor) else list(content)
        said = f"{len(values)} inputs"
    if len(values) != len(names):
        raise TargetError("GC104", f"{path} has {said}; {file.path} takes {', '.join(names)}.")
    return {name: torch.as_tensor(value) for name, value in zip(names, values, strict=True)}


def _in_order(content: Mapping[Any, Tensor], names: Sequence[str]) -> list[Tensor]:
    """Return tensors by name, or by position (``arr_0`` of numpy.savez), in order; none if the keys are others."""
    if set(content) == set(names):
        return [content[name] for name in names]
    positions = [str(key).removeprefix("arr_") for key in content]
    return list(content.values()) if positions == [str(k) for k in range(len(names))] else []


def draw_inputs(file: OnnxFile, seed: int, *, optimised: bool = True) -> dict[str, Tensor]:
    """Return inputs of the graph's types that it runs on.

    Args:
        file: the graph.
        seed: of the values.
        optimised: whether it has to run with onnxruntime's optimiser on.

    Raises:
        TargetError: GC104 if it runs on none that were tried; GC602 if onnxruntime makes no session of it.
    """
    running, said = session(file, optimised=optimised), ""
    for largest in _LARGEST_INTEGERS:
        for size in _FREE_SIZES:
            feeds = {each.name: _drawn(each, size, largest, seed + k) for k, each in enumerate(file.inputs)}
            try:
                run(running, feeds)
            except RuntimeError as error:
                said = said or first_line(error)
            else:
                return feeds
    raise TargetError(
        "GC104", f"{file.path} runs on no inputs that were drawn for it ({said}); pass some with --inputs."
    )


def variations(example: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Give the inputs, and the same redrawn and with flipped signs."""
    generator = torch.Generator().manual_seed(seed + 1)
    yield "example", dict(example)
    yield "seed", {name: redraw(value, generator) for name, value in example.items()}
    yield "flipped signs", {name: -value if value.is_floating_point() else value for name, value in example.items()}


def extremes(example: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Give the inputs with all floats zero, large, small and tiny, signs at random; and with other integers.

    How large an integer may be is not known, so none is above the greatest of its input in the example, and where all
    are the same, they stay. Small and negative ones are no zeros: what divides by them would not run.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    floats: dict[str, Callable[[Tensor], Tensor]] = {
        trial: partial(_sized, size=size, generator=generator)
        for trial, size in {"zeros": 0.0, "large values": 1e4, "small values": 1e-3, "tiny values": 1e-30}.items()
    }
    integers: dict[str, Callable[[Tensor], Tensor]] = {
        "lowest integers": lambda value: torch.full_like(value, min(0, _ends(value)[0])),
        "highest integers": lambda value: torch.full_like(value, _ends(value)[1]),
        "small integers": lambda value: _few(value, generator).clamp(max=_ends(value)[1]).to(value.dtype),
        "negative integers": lambda value: -_few(value, generator).to(value.dtype) if _is_signed(value) else value,
    }
    for applies, kinds in ((torch.is_floating_point, floats), (_varies, integers)):
        if any(map(applies, example.values())):
            for trial, of in kinds.items():
                yield trial, {name: of(value) if applies(value) else value for name, value in example.items()}


def vary_sizes(file: OnnxFile, example: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Give the inputs with each free size one larger, each by another number, and one; nothing where none is free.

    Sizes of one name are the same. The last slice is repeated where there are not as many.
    """
    named = {each for port in file.inputs for each in describe_port(port)[1] or () if isinstance(each, str)}
    ranks = {name: rank for rank, name in enumerate(sorted(named), 1)}
    if ranks:
        yield "larger sizes", _resized(file, example, lambda name, size: size + 1)
    if len(ranks) > 1:
        yield "unequal sizes", _resized(file, example, lambda name, size: size + 1 + ranks[name])
    if ranks:
        yield "sizes of one", _resized(file, example, lambda name, size: 1)


def _resized(file: OnnxFile, example: Mapping[str, Tensor], size_of: Callable[[str, int], int]) -> dict[str, Tensor]:
    others = dict(example)
    for port in file.inputs:
        for axis, name in enumerate(describe_port(port)[1] or ()):
            value = others[port.name]
            if isinstance(name, str) and value.shape[axis]:
                size = size_of(name, value.shape[axis])
                last = value.narrow(axis, -1, 1)
                others[port.name] = torch.cat([value, *[last] * (size - value.shape[axis])], axis).narrow(axis, 0, size)
    return others


def _varies(value: Tensor) -> bool:
    """Return whether there are several integers, or both booleans."""
    is_whole = not (value.is_floating_point() or value.is_complex())
    return is_whole and value.numel() > 0 and bool((value != value.reshape(-1)[0]).any())


def _ends(value: Tensor) -> tuple[int, int]:
    known = value.long()  # torch finds no least one in some types
    return int(known.min()), int(known.max())


def _few(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(1, 4, value.shape, generator=generator)


def _is_signed(value: Tensor) -> bool:
    return value.dtype.is_signed and value.dtype != torch.bool


def _sized(value: Tensor, *, size: float, generator: torch.Generator) -> Tensor:
    size = min(size, _LARGE.get(value.dtype, size))
    size = max(size, _TINY.get(value.dtype, size)) if size else size
    signed = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (signed * size).to(value.dtype)


def _drawn(port: onnx.ValueInfoProto, size: int, largest: int, seed: int) -> Tensor:
    dtype_name, sizes = describe_port(port)
    dtype = getattr(torch, dtype_name, None)
    shape = [each if isinstance(each, int) else size for each in sizes or ()]
    if not isinstance(dtype, torch.dtype) or sizes is None or math.prod(shape) > _MOST_ELEMENTS:
        raise TargetError(
            "GC104", f"nothing can be drawn for input {port.name!r} of {port_text(port)}; pass it with --inputs."
        )
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(0, largest + 1, shape, generator=generator).to(dtype)
