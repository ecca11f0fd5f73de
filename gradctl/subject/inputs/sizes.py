"""``--sizes 'batch=1,2,7; seq@x:1=1,17'``: a subject at other sizes of its inputs, and in other layouts of memory."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.inputs.dynamic_sizes import Dynamic, by_leaf
from gradctl.subject.inputs.example import Inputs, input_names, inputs_from_beside
from gradctl.subject.inputs.variations import VARIATIONS, map_tensors, redraw
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.signature import own_signature
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

MOST_SIZES = TargetOptions("").max_sizes

_AXIS = r"(?:input:)?[\w.]+:\d+"
_ITEM = re.compile(
    rf"(?:(?P<name>[A-Za-z]\w*)(?:@(?P<axes>{_AXIS}(?:,{_AXIS})*))?|(?P<axis>{_AXIS}))=(?P<values>\d+(?:,\d+)*)"
)
# As reports write it before the name of an input, which may be ``input``, too.
_PREFIX = re.compile(r"^input:(?=.*:)")
# The layout whose loss is a sum of the outputs.
EXPANDED = "expanded cotangent"
# Candidates for the next combination of a sample, of which the one with the most new pairs of values is taken.
_DRAWS = 64


@dataclass(frozen=True, slots=True)
class Size:
    """One size that varies.

    Attributes:
        name: ``batch``, or ``x:0`` if it has no name of its own.
        values: in ascending order.
        axes: the axes that have it, as (input, axis); empty if they are found by the name.
    """

    name: str
    values: tuple[int, ...]
    axes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        axes = ",".join(f"{name}:{axis}" for name, axis in self.axes)
        at = f"@{axes}" if axes and axes != self.name else ""
        return f"{self.name}{at}={','.join(map(str, self.values))}"


Sizes = tuple[Size, ...]


def parse_sizes(text: str) -> Sizes:
    """Return the sizes of ``batch=1,2,7; seq@x:1,mask:1=1,17; y:0=3``.

    Raises:
        ValueError: an item is none of NAME=…, NAME@INPUT:AXIS=… and INPUT:AXIS=…, a value is 0, or a name or an axis
            is given twice.
    """
    sizes = [_parsed(item) for item in text.split(";") if item.strip()]
    if not sizes:
        raise ValueError(f"{text!r} has no sizes. Write, for example, 'batch=1,2,7'.")
    for what, given in (
        ("size", [size.name for size in sizes]),
        ("axis", [f"{name}:{axis}" for size in sizes for name, axis in size.axes]),
    ):
        if repeated := next((each for each in given if given.count(each) > 1), None):
            raise ValueError(f"{what} {repeated!r} is given twice in {text!r}; give it once.")
    return tuple(sizes)


def sizes_from(given: str | Mapping[str, int | Iterable[int]] | None) -> Sizes:
    """Return the sizes of a text, or of a mapping from NAME, NAME@INPUT:AXIS or INPUT:AXIS to values; () of None.

    Raises:
        TargetError: GC128 as ``parse_sizes``.
    """
    if given is None:
        return ()
    if not isinstance(given, str):
        if not isinstance(given, Mapping):
            raise TargetError("GC128", f"--sizes: {given!r} is no mapping. Give, for example, {{'batch': [1, 2, 7]}}.")
        listed = {name: values if isinstance(values, Iterable) else [values] for name, values in given.items()}
        given = "; ".join(f"{name}={','.join(map(str, values))}" for name, values in listed.items())
    try:
        return parse_sizes(given)
    except ValueError as error:
        raise TargetError("GC128", f"--sizes: {error}") from None


def without_layout(name: str) -> str:
    """Return the sizes in a name of ``sized_subjects``: ``batch=7, seq=17`` of ``batch=7, seq=17, transposed``."""
    sizes, _, last = name.rpartition(", ")
    return name if "=" in last else sizes


def _parsed(item: str) -> Size:
    match = _ITEM.fullmatch("".join(item.split()))
    if match is None:
        said = "is not NAME=N,N or INPUT:AXIS=N,N. Write, for example, 'batch=1,2,7; seq@x:1=1,17'."
        raise ValueError(f"{item.strip()!r} {said}")
    values = tuple(sorted({int(value) for value in match["values"].split(",")}))
    if values[0] == 0:
        raise ValueError(f"{item.strip()!r} has the size 0; the smallest is 1.")
    texts = (match["axes"] or match["axis"] or "").split(",")
    plain = [_PREFIX.sub("", each) for each in texts if each]
    axes = tuple((name, int(axis)) for name, _, axis in (each.rpartition(":") for each in plain))
    return Size(match["name"] or plain[0], values, axes)


def sized_subjects(
    subject: Subject, sizes: Sizes, *, limit: int = MOST_SIZES
) -> Iterator[tuple[str, Subject | TargetError]]:
    """Return the subject at combinations of sizes, the smallest first, by name: ``batch=7, seq=17``.

    A combination that is the example's own has the example's values. Four layouts of memory are tried at combinations
    without a size of 1, the smallest first: ``batch=7, seq=17, transposed``.

    Args:
        subject: the model and its inputs.
        sizes: of inputs. A size is a keyword argument of the function beside the target, or has axes, or is ``batch``:
            axis 0 of the first tensor, and of every other with the same size there.
        limit: the largest number of combinations, at least 2; of more, a sample (``combinations``).

    Returns:
        Names with subjects, or with the error of the function beside the target at these sizes.

    Raises:
        TargetError: GC128 if a size has no axis; GC104 if an input or an axis does not exist.
    """
    asked = [size.name for size in sizes if _is_asked(subject, size)]
    dynamic = _dynamic(subject, [size for size in sizes if size.name not in asked], sizes)
    by_leaf(subject.model, subject.args, subject.kwargs, dynamic, frozenset, option="--sizes")
    chosen = [
        dict(zip([size.name for size in sizes], values, strict=True))
        for values in combinations([size.values for size in sizes], limit, subject.seed)
    ]
    return _made(subject, chosen, dynamic, asked)


def combinations(values: Sequence[Sequence[int]], limit: int, seed: int) -> list[tuple[int, ...]]:
    """Return combinations of ascending values, the smallest product first: all, or a sample of ``limit``.

    In a sample are the smallest and the largest; then each value once, and pairs of values, as far as the limit allows.
    """
    chosen = [tuple(each[0] for each in values), tuple(each[-1] for each in values)]
    if math.prod(map(len, values)) <= limit:
        chosen = list(itertools.product(*values))
    generator = random.Random(seed)
    while len(chosen) < min(limit, math.prod(map(len, values))):
        columns = list(zip(*chosen, strict=True))
        missing = [[v for v in each if v not in column] for each, column in zip(values, columns, strict=True)]
        seen = set().union(*map(_pairs, chosen))
        draws = [
            tuple(generator.choice(few or each) for few, each in zip(missing, values, strict=True))
            for _ in range(_DRAWS)
        ]
        new = [draw for draw in draws if draw not in chosen]
        chosen += [max(new, key=lambda draw: len(_pairs(draw) - seen))] if new else []
    return sorted(dict.fromkeys(chosen), key=lambda each: (math.prod(each), each))


def _pairs(values: Sequence[int]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(enumerate(values), 2))


def _is_asked(subject: Subject, size: Size) -> bool:
    """Return whether the function beside the target takes a size by keyword."""
    source = subject.inputs_beside[1] if subject.inputs_beside is not None else None
    signature = own_signature(source) if callable(source) and not size.axes else None
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return signature is not None and any(
        each.kind is inspect.Parameter.VAR_KEYWORD or (each.name == size.name and each.kind in by_keyword)
        for each in signature.parameters.values()
    )


def _dynamic(subject: Subject, found: Sequence[Size], sizes: Sizes) -> dict[str, dict[int, str]]:
    """Return the name of the size of each axis, by input and axis, of the sizes ``found`` in the inputs themselves."""
    shapes = {
        name: tuple(value.shape)
        for name, value in input_names(subject.model, subject.args, subject.kwargs)
        if isinstance(value, Tensor)
    }
    dynamic: dict[str, dict[int, str]] = {}
    for size in found:
        axes = size.axes or (_like_first(shapes, 0) if size.name == "batch" else ())
        if not axes:
            raise _without_axis(size, sizes, shapes)
        for name, axis in axes:
            other = dynamic.setdefault(name, {}).setdefault(axis, size.name)
            if other != size.name:
                said = f"axis {axis} of input {name!r} has two sizes, {other!r} and {size.name!r}; give it one."
                raise TargetError("GC128", f"--sizes: {said}")
    return dynamic


def _like_first(shapes: Mapping[str, tuple[int, ...]], axis: int) -> tuple[tuple[str, int], ...]:
    """Return this axis of the first tensor that has it, and of all others with the same size there."""
    having = {name: shape[axis] for name, shape in shapes.items() if len(shape) > axis}
    first = next(iter(having.values()), None)
    return tuple((name, axis) for name, size in having.items() if size == first)


def _without_axis(size: Size, sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> TargetError:
    """Return GC128 with the line to type: the second axis of the inputs is the best guess."""
    axes = _like_first(shapes, 1) or _like_first(shapes, 0)
    if not axes:
        return TargetError("GC128", f"--sizes: no input is a tensor, so none has the size {size.name!r}.")
    line = "; ".join(str(replace(each, axes=axes) if each is size else each) for each in sizes)
    said = f"--sizes: no axis has the name {size.name!r}. Name the axis, for example --sizes '{line}',"
    return TargetError("GC128", f"{said} or let the function of inputs beside the target take {size.name}=.")


def _made(
    subject: Subject, chosen: Sequence[Mapping[str, int]], dynamic: Dynamic, asked: Sequence[str]
) -> Iterator[tuple[str, Subject | TargetError]]:
    larger = [each for each in chosen if min(each.values()) > 1] or chosen[-1:]
    layouts = {name: larger[i % len(larger)] for i, name in enumerate(_LAYOUTS)}
    for each in chosen:
        name = ", ".join(f"{size}={value}" for size, value in each.items())
        made = _at_size(subject, each, dynamic, asked)
        yield name, made
        for layout, where in layouts.items():
            laid_out = _LAYOUTS[layout](made) if where is each and isinstance(made, Subject) else None
            if laid_out is not None:
                yield f"{name}, {layout}", laid_out


def _at_size(
    subject: Subject, chosen: Mapping[str, int], dynamic: Dynamic, asked: Sequence[str]
) -> Subject | TargetError:
    inputs = Inputs(subject.args, subject.kwargs)
    if asked and subject.inputs_beside is not None:
        name, function = subject.inputs_beside
        device = next((leaf.device for _, leaf in leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))
        with preserve_generators():
            seed_generators(subject.seed)
            try:
                made = functools.partial(function, **{size: chosen[size] for size in asked})
                inputs = inputs_from_beside(name, made, subject.model)
            except TargetError as error:
                return error
        inputs = map_leaves(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)
    args, kwargs = _resized(replace(subject, args=inputs.args, kwargs=inputs.kwargs), chosen, dynamic)
    return replace(subject, args=args, kwargs=kwargs)


def _resized(subject: Subject, chosen: Mapping[str, int], dynamic: Dynamic) -> Any:
    """Return the inputs with each axis of a size as long as that; one tensor given twice stays one."""
    generator = torch.Generator().manual_seed(subject.seed)
    named = by_leaf(subject.model, subject.args, subject.kwargs, dynamic, lambda axes: frozenset(axes.items()))
    axes_of = iter(leaves(named))
    made: dict[Any, Tensor] = {}

    def resized(_: str, leaf: object) -> object:
        _, axes = next(axes_of)  # None for all but tensors
        if not isinstance(leaf, Tensor) or not axes:
            return leaf
        names = dict(axes)
        shape = tuple(chosen[names[axis]] if axis in names else size for axis, size in enumerate(leaf.shape))
        key = (id(leaf), shape)
        if key not in made:
            made[key] = resize(leaf, shape, generator)
        return made[key]

    return map_leaves(resized, (subject.args, subject.kwargs))


def resize(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a tensor of another shape with values like those of this one; of the same shape, itself.

    Masks are tiled: booleans, integers with two values at most, floats that are all whole numbers or infinite. Other
    integers are drawn from those that are there. Other floats have the same root mean square; if none is negative (a
    probability, a variance), they are uniform between the smallest and the largest.

    Raises:
        TargetError: GC128 if there is no value to begin with, or the tensor is sparse.
    """
    if tuple(tensor.shape) == shape:
        return tensor
    if tensor.layout != torch.strided or not tensor.numel():
        kind = "empty" if tensor.layout == torch.strided else "sparse"
        raise TargetError("GC128", f"--sizes: an input is {kind} ({list(tensor.shape)}), and has no other sizes.")
    tiled = tensor.detach()
    for axis, size in enumerate(shape):
        tiled = tiled.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return _redrawn(tiled, generator).requires_grad_(tensor.requires_grad)


def _redrawn(tiled: Tensor, generator: torch.Generator) -> Tensor:
    if tiled.is_complex():
        return redraw(tiled, generator)
    finite = torch.isfinite(tiled)
    values = tiled[finite]
    is_float = tiled.is_floating_point()
    is_mask = values == values.round() if is_float else (values == values.min()) | (values == values.max())
    if bool(is_mask.all()):
        return tiled
    if not is_float or float(values.min()) < 0:
        return redraw(tiled, generator)
    low, high = float(values.min()), float(values.max())
    drawn = low + (high - low) * torch.rand(tiled.shape, generator=generator, dtype=torch.float64)
    return torch.where(finite, drawn.to(tiled), tiled)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.ndim > 1 else tensor


def _with_offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


def _expanded(subject: Subject) -> Subject | None:
    """Return the subject with a loss whose backward gives the outputs expanded cotangents; None if it has a loss."""
    return None if subject.loss is not None else replace(subject, loss=sum_over_first_axis)


def sum_over_first_axis(outputs: Any) -> Tensor:
    """Return the sum of the float outputs over their first axis, weighted along the others.

    The cotangent of an output is expanded along the first axis: it has the stride 0 there, as after ``x.mean(0)``.
    """
    total = torch.zeros(())
    for _, output in leaves(outputs):
        is_strided = isinstance(output, Tensor) and output.layout == torch.strided
        if is_strided and (output.is_floating_point() or output.is_complex()):
            parts = torch.view_as_real(output) if output.is_complex() else output
            if not torch.isfinite(parts.detach()).all():  # masked logits of -inf
                parts = torch.where(torch.isfinite(parts), parts, 0)
            summed = parts.sum(0) if parts.ndim else parts
            weights = torch.arange(1.0, summed.numel() + 1, dtype=torch.float64).cos().reshape(summed.shape)
            total = total.to(summed.device) + (summed * weights.to(summed)).sum()
    return total


def _relaid(function: Callable[[Tensor], Tensor], subject: Subject) -> Subject:
    return map_tensors(subject, lambda tensor: function(tensor) if tensor.layout == torch.strided else tensor)


# By name: the subject in a layout of memory; None if it cannot be had.
_LAYOUTS: dict[str, Callable[[Subject], Subject | None]] = {
    "transposed": functools.partial(_relaid, _transposed),
    "strided": functools.partial(_relaid, VARIATIONS["non-contiguous"]),
    "offset storage": functools.partial(_relaid, _with_offset),
    EXPANDED: _expanded,
}
