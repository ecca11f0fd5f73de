"""One ``--input``: ``x=f32[8,784]``, its parts, and the value drawn for it.

``[NAME=]DTYPE[SHAPE][RANGE]``, where RANGE is ``@low..high`` (low may occur, high may not, as in ``torch.randint``;
of floats high may by rounding) or ``~N(mean,std)`` (floats and complex). Without a range: floats and complex numbers
are standard normal, integers from 0 to 9, bools a fair coin. ``[]`` is a tensor of one number. Anything else is a
Python literal: ``n=3``, ``flag=True``, ``mask=None``, ``shape=[8,784]``.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl.core.errors import TargetError, nearest
from gradctl.core.names import DTYPES

# Without a range: small enough for most embeddings and class numbers, and not all equal.
_INTEGERS = (0, 10)

_NAMED = re.compile(r"\s*([^\W\d]\w*)\s*=\s*(.*)", re.DOTALL)
_TENSOR = re.compile(r"(?P<dtype>[A-Za-z]\w*)\s*\[(?P<shape>[^\]]*)\]\s*(?P<values>.*)", re.DOTALL)
_NORMAL = re.compile(r"~\s*N\s*\(([^,]*),([^,]*)\)")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to draw.

    Attributes:
        dtype: short name, a key of ``DTYPES``.
        shape: sizes.
        between: lowest value, and the bound above that never occurs; None draws the dtype's own way.
        normal: mean and standard deviation.
    """

    dtype: str
    shape: tuple[int, ...]
    between: tuple[float, float] | None = None
    normal: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.between is not None:
            return f"{text}@{self.between[0]!r}..{self.between[1]!r}"
        return text if self.normal is None else f"{text}~N({self.normal[0]!r},{self.normal[1]!r})"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One ``--input``: a name, or None for the next position, and a tensor to draw or a Python literal."""

    name: str | None
    value: TensorSpec | Any

    def __str__(self) -> str:
        text = str(self.value) if isinstance(self.value, TensorSpec) else repr(self.value)
        return text if self.name is None else f"{self.name}={text}"


def parse_input(text: str) -> InputSpec:
    """Return one ``--input``, parsed.

    Raises:
        TargetError: GC104 with the part that is wrong and an example: dtype, shape, range or literal.
    """
    named = _NAMED.fullmatch(text)
    name, value = (named[1], named[2].strip()) if named else (None, text.strip())
    matched = _TENSOR.fullmatch(value)
    if matched is None:
        return InputSpec(name, _literal(text, value))
    dtype, shape = matched["dtype"], matched["shape"]
    if dtype not in DTYPES:
        whole = re.sub("^fp", "float", dtype.lower())
        short = next((key for key, full in DTYPES.items() if full == whole), None)
        near = f" (did you mean {short!r}?)" if short else nearest(dtype, DTYPES)
        raise _wrong(text, f"{dtype!r} is no dtype{near}; there are {', '.join(DTYPES)}")
    between, normal = _range(text, dtype, matched["values"].strip())
    return InputSpec(name, TensorSpec(dtype, _shape(text, shape), between, normal))


def short_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype in an ``--input``; torch's own name of one that cannot be drawn."""
    full = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == full), full)


def draw(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Return a tensor as ``spec`` says, on the CPU; half precision is drawn in float32 and rounded."""
    dtype: torch.dtype = getattr(torch, DTYPES[spec.dtype])
    drawn_in = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    with torch.device("cpu"):  # where the generator is, whatever default device the user's code set
        if dtype is torch.bool:
            return torch.randint(0, 2, spec.shape, generator=generator).bool()
        if not (dtype.is_floating_point or dtype.is_complex):
            low, high = spec.between or _INTEGERS
            return torch.randint(int(low), int(high), spec.shape, dtype=dtype, generator=generator)
        if spec.between is not None:
            low, high = spec.between
            part = torch.rand(spec.shape, dtype=drawn_in, generator=generator)
            return (low * (1 - part) + high * part).to(dtype)  # high - low may be more than the dtype holds
        mean, std = spec.normal or (0.0, 1.0)
        return (mean + std * torch.randn(spec.shape, dtype=drawn_in, generator=generator)).to(dtype)


def _shape(text: str, sizes: str) -> tuple[int, ...]:
    """Return the sizes between the brackets."""
    if not sizes.strip():
        return ()
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise _wrong(text, f"[{sizes}] is no shape: sizes are whole numbers from 0, with commas between them")
    return tuple(int(part) for part in parts)


def _range(text: str, dtype: str, values: str) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Return the bounds and the normal distribution in ``values``: one of them, or neither."""
    if not values:
        return None, None
    if dtype == "bool":
        raise _wrong(text, f"a bool has no range, and {values!r} was given")
    if values[0] == "@" and ".." in values:
        return _bounds(text, dtype, values), None
    return None, _mean_and_deviation(text, dtype, values)


def _mean_and_deviation(text: str, dtype: str, values: str) -> tuple[float, float]:
    """Return mean and standard deviation of ``~N(mean,std)``, for a float or complex dtype."""
    matched = _NORMAL.fullmatch(values)
    if matched is None:
        raise _wrong(text, f"{values!r} after the shape is neither @low..high nor ~N(mean,std)")
    if dtype[0] in "iu":
        raise _wrong(text, f"an integer tensor takes @low..high and no {values!r}")
    mean, std = (_number(text, part, is_float=True) for part in matched.groups())
    if std < 0:
        raise _wrong(text, f"the standard deviation {std!r} is below 0")
    return mean, std


def _bounds(text: str, dtype: str, values: str) -> tuple[float, float]:
    """Return the two numbers of ``@low..high``, the first below the second, both within the dtype."""
    full: torch.dtype = getattr(torch, DTYPES[dtype])
    if full.is_complex:
        raise _wrong(text, f"a complex tensor takes ~N(mean,std) and no {values!r}")
    low, _, high = values[1:].partition("..")
    is_float = full.is_floating_point
    lowest, bound = _number(text, low, is_float), _number(text, high, is_float)
    if lowest >= bound:
        raise _wrong(text, f"@{low}..{high} is empty: {high} itself does not occur")
    limits = torch.finfo(full) if is_float else torch.iinfo(full)
    # torch.randint takes its bound as an int64, whatever the dtype.
    most = limits.max if is_float or dtype == "i64" else limits.max + 1
    if lowest < limits.min or bound > most:
        raise _wrong(text, f"@{low}..{high} does not fit {dtype}, which goes from {limits.min:g} to {limits.max:g}")
    return lowest, bound


def _number(text: str, written: str, is_float: bool) -> float:
    """Return a finite number as written; a whole one for integers."""
    try:
        value = float(written) if is_float else int(written)
    except ValueError:
        raise _wrong(text, f"{written.strip()!r} is no {'number' if is_float else 'whole number'}") from None
    if value - value != 0:
        raise _wrong(text, f"{written.strip()!r} is not finite")
    return value


def _literal(text: str, value: str) -> Any:
    """Return the Python literal that ``value`` is."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        words = {"true": "True", "false": "False", "none": "None", "null": "None"}
        means = words.get(value.lower())
        hint = f" (did you mean {means}?)" if means else ""
        said = f"{value!r} is neither a tensor like f32[8,784] nor a Python literal like 3, True or 'mean'{hint}"
        raise _wrong(text, said) from None


def _wrong(text: str, why: str) -> TargetError:
    return TargetError("GC104", f"--input {text!r}: {why}. Write, for example, --input 'x=f32[8,784]'.")
