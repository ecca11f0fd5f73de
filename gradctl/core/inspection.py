"""What ``gradctl inspect`` finds, as data; its ``--format json`` is exactly these types.

A contract of its own beside the report: keys are added, never renamed or dropped, while ``schema_version`` is 1.
``null`` means "not known" (a file says nothing of it, or the model was not run backwards), which is not ``false``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gradctl.core.findings import Location

Source = Literal["program", "torchscript", "export", "onnx"]
SemanticKind = Literal[
    "custom function", "custom operator", "hook", "cut", "control flow", "training mode", "random numbers"
]


class ParameterRow(msgspec.Struct, frozen=True, kw_only=True):
    """One storage that holds parameters, under its first name; an initializer in ONNX.

    ``tied`` are its other names, ``frozen`` says that it requires no gradient, ``unused`` that one eager call and its
    backward gave it none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tied: tuple[str, ...] = ()
    frozen: bool | None = None
    unused: bool | None = None


class BufferRow(msgspec.Struct, frozen=True, kw_only=True):
    """One buffer; ``changes`` says whether one eager call changes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    changes: bool | None = None


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output: its type as the file or program has it, for example ``float32[8, 32]`` or ``Tensor``."""

    name: str
    type: str


class Semantic(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in the program that a static form may take otherwise than autograd does.

    ``name`` is the Function, operator, module or torch call; ``count`` how often it ran at this place in one call;
    ``tensors`` those it leaves without gradient, or depends on.
    """

    kind: SemanticKind
    name: str
    message: str
    count: int = 1
    tensors: tuple[str, ...] = ()
    location: Location | None = None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one target or file.

    Attributes:
        subject: the target or the file, as named.
        source: what it is.
        inputs, outputs: in order.
        parameters, buffers: in order.
        elements: of all parameters, each storage once.
        bytes: of parameters and buffers together, each storage once.
        semantics: of a program; of a file, the inputs that are to be drawn.
        operators: calls by operator, the most frequent first; empty for a program, which has no graph yet.
        guards: what an exported program requires of the sizes of its inputs.
        opsets: of ONNX, by domain.
        notes: what could not be found out, in a sentence each.
    """

    schema_version: Literal[1] = 1
    subject: str
    source: Source
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    parameters: tuple[ParameterRow, ...] = ()
    buffers: tuple[BufferRow, ...] = ()
    elements: int = 0
    bytes: int = 0
    semantics: tuple[Semantic, ...] = ()
    operators: dict[str, int] = {}
    guards: tuple[str, ...] = ()
    opsets: dict[str, int] = {}
    notes: tuple[str, ...] = ()
