"""The report as data: what every check produces and every renderer reads. The JSON contract is exactly these types."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from gradctl.core.names import Component, Quantity, Severity, TensorVerdict, UnitStatus, UnitVerdict
from gradctl.core.numbers import Number
from gradctl.core.optimization import Optimization
from gradctl.core.structure import Structure
from gradctl.core.training import Training


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the user's program: any field may be unknown."""

    file: str | None = None
    line: int | None = None
    module: str | None = None
    op: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file or ""
        return ", ".join(part for part in (place, self.module or "", self.op or "") if part)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was found, by rule code.

    ``cause`` is the code of what brought it about, ``cause_message`` that in words: several findings can share it.
    ``error`` is its relative error (of norms), if it has one. ``allow`` is the value for ``--allow`` to
    accept it; ``allowed`` says that it was given. ``repro`` is the program that ``--repro`` wrote for it.
    """

    code: str
    severity: Severity
    message: str
    hint: str = ""
    cause: str | None = None
    cause_message: str = ""
    quantity: Quantity | None = None
    tensor: str | None = None
    verdict: TensorVerdict | None = None
    error: Number = None
    allow: str | None = None
    allowed: bool = False
    location: Location | None = None
    repro: str | None = None
    fingerprint: str = ""


def note(code: str, message: str, hint: str = "", **fields: Any) -> Finding:
    """Return a finding that fails no unit."""
    return Finding(code=code, severity="note", message=message, hint=hint, **fields)


class Element(msgspec.Struct, frozen=True, kw_only=True):
    """One element of a tensor that differs.

    For eager's own gradient ``reference`` is autograd's value and ``candidate`` is null; for a form ``reference`` is
    eager's value and ``candidate`` the form's. Errors are against the finite difference if there is one. An element of
    a complex tensor is two, each with its ``component``.
    """

    index: tuple[int, ...]
    component: Component | None = None
    reference: Number
    candidate: Number = None
    finite_difference: Number = None
    absolute_error: Number = None
    relative_error: Number = None


class LadderStep(msgspec.Struct, frozen=True, kw_only=True):
    """One finite difference: its step, the derivative that it states, and an estimate of its absolute error."""

    step: float
    derivative: Number
    error: Number


class StepLadder(msgspec.Struct, frozen=True, kw_only=True):
    """The finite differences of one directional derivative, from the largest step to the smallest.

    ``reference`` is the derivative along the same direction by autograd of the eager model, ``candidate`` that of the
    form; null for eager's own gradient.
    """

    steps: tuple[LadderStep, ...]
    reference: Number
    candidate: Number = None


class ErrorMap(msgspec.Struct, frozen=True, kw_only=True):
    """The absolute error of each element of a tensor, as a matrix: its first axis by all others, in blocks if large.

    ``values`` are ``rows`` times ``columns`` cells, row by row; each is the largest error of a block of
    ``block_rows`` by ``block_columns`` elements, with three significant digits.
    """

    rows: int
    columns: int
    block_rows: int
    block_columns: int
    values: tuple[Number, ...]


class SourceExcerpt(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a file of the user's program around ``line``, as they were when the report was made."""

    file: str
    line: int
    first_line: int
    lines: tuple[str, ...]


class TensorResult(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one tensor. ``error`` is norm-relative, against the oracle; ``budget`` what rounding explains.

    ``ladder`` and ``errors`` are there for the worst few tensors of a unit that differ.
    """

    quantity: Quantity
    tensor: str
    verdict: TensorVerdict
    shape: tuple[int, ...]
    dtype: str
    tied: tuple[str, ...] = ()
    error: Number = None
    budget: Number = None
    max_abs: Number = None
    elements_wrong: int | None = None
    worst: tuple[Element, ...] = ()
    ladder: StepLadder | None = None
    errors: ErrorMap | None = None


class Oracle(msgspec.Struct, frozen=True, kw_only=True):
    """How the finite differences were made, and what they could have missed.

    At this input, an error of ``of_error`` (relative) in any one of the tensors that were judged would have been missed
    with ``missed_with_probability``.
    ``noise`` is the relative noise floor of the function, ``forwards`` counts float64 forwards, ``islands`` names
    operators that ran in their own dtype, ``held_fixed`` counts the cuts of the program that were replayed.
    """

    dtype: str
    islands: tuple[str, ...] = ()
    noise: Number = None
    forwards: int = 0
    probes: int = 0
    missed_with_probability: Number = None
    of_error: float = 0.01
    held_fixed: int = 0


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a form's capture and calls: medians of calls interleaved with eager's; null where it has none.

    ``training`` is forward and backward, ``forward`` its first part, or a call under ``no_grad`` without gradients.
    The noise is half the range between the quartiles of the ratio of the two; null after a single pair of calls.
    """

    capture: float
    forward: float | None = None
    eager_forward: float | None = None
    training: float | None = None
    eager_training: float | None = None
    forward_noise: float | None = None
    training_noise: float | None = None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A median of rounds, and the confidence interval of it: seconds, or a ratio of two times.

    The interval has a coverage of at least 95 %; ``lower`` and ``upper`` are null if there are too few rounds for that.
    """

    median: float
    lower: float | None = None
    upper: float | None = None

    @property
    def margin(self) -> float | None:
        """The distance from the median to the end of the interval that is farther away."""
        if self.lower is None or self.upper is None:
            return None
        return max(self.median - self.lower, self.upper - self.median)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What a form costs on the inputs of the example, or at other ``sizes`` of them (``batch=8``).

    ``verdict``, ``status`` and ``reason`` are those of the comparison at these sizes. All times are in seconds.
    ``first_call`` is that after the capture, forward and backward. ``forward`` records for the backward if the form has
    gradients; ``training`` is forward and backward. Ratios are the time of the form divided by that of eager, round by
    round in one process; ``rounds`` is how many there were.

    ``loaded_bytes`` is what the process held before the capture, ``peak_bytes`` the most until the first calls ended:
    resident memory, on a GPU what torch's allocator gave out. ``artifact_bytes`` is the size of the file. ``nodes`` are
    calls of operators in the graph. ``pays_after`` is the number of calls after which the capture was worth it, null if
    it is not known to be. ``seconds_measured`` is the time inside of the timed calls, of ``seconds_timing`` that the
    rounds took.
    """

    sizes: str | None = None
    verdict: UnitVerdict
    status: UnitStatus = "complete"
    reason: str | None = None
    capture: float | None = None
    first_call: float | None = None
    forward: Estimate | None = None
    eager_forward: Estimate | None = None
    forward_ratio: Estimate | None = None
    training: Estimate | None = None
    eager_training: Estimate | None = None
    training_ratio: Estimate | None = None
    rounds: int = 0
    loaded_bytes: int | None = None
    peak_bytes: int | None = None
    artifact_bytes: int | None = None
    nodes: int | None = None
    graph_breaks: int | None = None
    recompilations: int | None = None
    pays_after: int | None = None
    seconds_measured: float = 0.0
    seconds_timing: float = 0.0

    @property
    def ratio(self) -> Estimate | None:
        """The ratio of a training step if there is one, else that of a forward."""
        return self.training_ratio or self.forward_ratio


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One target in one form. ``reason`` says in one sentence why a unit is not complete; ``details`` holds stacks.

    ``expected`` is there where the configuration expects another verdict than pass: met, the unit passes, with its
    findings allowed; not met, it fails with GC152. ``reference`` is the file that it was held against; None stands for
    eager, and for finite differences of eager. ``optimization`` is there where the unit is a graph that ``optimize``
    made, ``structure`` where it is an ONNX file that was compared with another, ``training`` where it is a variant of
    the training step, ``measurements`` (one for each size of the inputs) if ``bench`` measured what it costs.
    """

    target: str
    form: str
    verdict: UnitVerdict
    status: UnitStatus = "complete"
    expected: UnitVerdict | None = None
    reference: str | None = None
    reason: str | None = None
    details: str | None = None
    seconds: float = 0.0
    oracle: Oracle | None = None
    variations: tuple[str, ...] = ()
    timing: Timing | None = None
    optimization: Optimization | None = None
    structure: Structure | None = None
    training: Training | None = None
    measurements: tuple[Measurement, ...] = ()
    tensors: tuple[TensorResult, ...] = ()
    findings: tuple[Finding, ...] = ()


class Allowance(msgspec.Struct, frozen=True, kw_only=True):
    """One ``--allow`` as given, and whether anything matched it in this run."""

    allow: str
    applied: bool


class ShardAllow(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted finding of a run: the positions of its units, and how the note is made that it accepted nothing.

    It is one of the command line if ``is_option``. There is no note unless ``is_whole``: all units that it is for are
    of this run. ``fails`` is whether a note fails the first of them.
    """

    allow: str
    is_option: bool
    is_whole: bool
    positions: tuple[int, ...]
    fails: bool


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a run a report is: shard ``index`` of ``count``, from 1, of a run of ``planned`` units.

    ``plan`` is a digest of all units of the run with their options. ``positions`` are those of the units of this
    report.
    """

    index: int
    count: int
    plan: str
    planned: int
    positions: tuple[int, ...]
    allows: tuple[ShardAllow, ...] = ()


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """Which program wrote the report."""

    name: Literal["gradctl"] = "gradctl"
    version: str


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename={"passed": "pass"}):
    """Units by verdict."""

    passed: int = 0
    fail: int = 0
    inconclusive: int = 0
    skipped: int = 0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of one run. Read strictly by ``gradctl.report``; ``schema_version`` changes when a reader must.

    ``planned`` is how many units a run that was interrupted was to have, ``shard`` which part of a run this is.
    ``sources`` are the lines that the findings name.
    """

    schema_version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    tool: Tool
    command: str
    status: Literal["complete", "interrupted"] = "complete"
    verdict: UnitVerdict
    seed: int
    environment: dict[str, str | int | None]
    units: tuple[Unit, ...] = ()
    allows: tuple[Allowance, ...] = ()
    summary: Summary
    planned: int | None = None
    shard: Shard | None = None
    sources: tuple[SourceExcerpt, ...] = ()


def fingerprint(code: str, target: str, form: str, quantity: str | None, tensor: str | None) -> str:
    """Return a stable identity of a finding: 16 hex digits of what it is about, without numbers, cause or lines."""
    identity = "\0".join((code, target, form, quantity or "", tensor or ""))
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def json_schema(kind: Any, title: str) -> str:
    """Return the JSON schema of a type as text.

    It depends on the types alone: the same bytes for every supported version of msgspec, whatever docstrings say.
    """
    described = msgspec.to_builtins(msgspec.json.schema(kind), order="deterministic")
    for definition in described["$defs"].values():
        definition.pop("description", None)  # the docstring of the type, which msgspec 0.23 indents in another way
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_sorted(described)}
    return msgspec.json.format(msgspec.json.encode(named, order="deterministic"), indent=2).decode() + "\n"


def _sorted(described: Any) -> Any:
    """Return a part of a schema with the alternatives of each ``anyOf`` in order: msgspec 0.22 changed theirs."""
    if isinstance(described, list):
        return [_sorted(part) for part in described]
    if not isinstance(described, dict):
        return described
    parts = {key: _sorted(part) for key, part in described.items()}
    if isinstance(parts.get("anyOf"), list):
        parts["anyOf"].sort(key=lambda part: msgspec.json.encode(part, order="deterministic"))
    return parts
