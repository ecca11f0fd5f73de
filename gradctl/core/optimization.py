"""What ``gradctl optimize`` did to a graph, as data: each pass, and sizes and times before and after."""

from __future__ import annotations

from typing import Literal

import msgspec

from gradctl.core.numbers import Number
from gradctl.core.structure import GraphPart

PassStatus = Literal["kept", "unchanged", "set aside", "undone", "failed", "not installed", "not applicable"]


class GraphSize(msgspec.Struct, frozen=True, kw_only=True):
    """What a graph consists of, and an estimate of what one run of it takes.

    ``parameters`` counts elements of initializers, ``bytes`` what they take. ``flops`` and ``activation_bytes`` (the
    most that is alive at once) are estimates from inferred shapes, for the sizes of the example; ``uncounted`` is the
    number of nodes whose shapes are not known, which both leave out.
    """

    operators: dict[str, int]
    nodes: int
    initializers: int
    parameters: int
    bytes: int
    flops: int = 0
    activation_bytes: int = 0
    uncounted: int = 0


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one run in onnxruntime with all its optimisations: the median, and the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int


class PassOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one pass.

    ``error`` is the largest that it introduced in an output over all trials (norm-relative, against the graph before
    it), ``budget`` what rounding explains of that. ``changed`` says what is other, ``reason`` why it was not kept.
    """

    name: str
    backend: str
    status: PassStatus
    changed: str = ""
    reason: str | None = None
    tied_to_machine: bool = False
    error: Number = None
    budget: Number = None
    seconds: float = 0.0
    verification_seconds: float = 0.0
    size: GraphSize | None = None
    latency: Latency | None = None


class Optimization(msgspec.Struct, frozen=True, kw_only=True):
    """All passes over one graph. ``error`` and ``budget`` are of the result against the graph before all of them.

    ``parts`` are those of the graph that differ, for a drawing.
    """

    level: str | None
    before: GraphSize
    after: GraphSize
    passes: tuple[PassOutcome, ...] = ()
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    error: Number = None
    budget: Number = None
    tied_to_machine: bool = False
    opsets: dict[str, int] = {}
    parts: tuple[GraphPart, ...] = ()
