"""``gradctl compare A.onnx B.onnx``: do two files compute the same, as far as rounding lets one say?

There is no float64 run of an ONNX file to measure rounding by. So the first file is also run, twice, with its inputs
and weights changed by an ULP up or down: what its outputs move by, another order of the same sums may move them by too
(stochastic arithmetic, Vignes 1993, 10.1016/0378-4754(93)90003-D). Four times that is the budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from gradctl.checks.allows import Allows
from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, TensorResult, Unit, fingerprint, number
from gradctl.core.names import TensorVerdict
from gradctl.core.verdicts import unit_verdict
from gradctl.forms.onnx_file import OnnxFile, initializers, read, session
from gradctl.forms.onnx_session import described, run
from gradctl.numerics.agreement import agreement, scale_of
from gradctl.subject.frames import first_line
from gradctl.subject.tensorfile import INPUT_SUFFIXES, read_tensors
from gradctl.subject.variations import redrawn

__all__ = ["compare_files"]

# A size that a file leaves free, and the integers that an input may take: the first that the file runs on.
_FREE_SIZES = (3, 1, 8)
_LARGEST_INTEGERS = (99, 9, 1)
_PERTURBED = 2
_WEIGHT_AXES = 2  # a scale of Resize or a bound of Clip has fewer, and one ULP may change a shape


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One output at its worst: the trial, what differs, and what rounding explains of it."""

    name: str
    trial: str
    error: float
    budget: float
    expected: Tensor
    given: Tensor
    unstable: bool = False

    @property
    def structure(self) -> str:
        alike = self.expected.shape == self.given.shape and self.expected.dtype == self.given.dtype
        return "" if alike else f"{_kind(self.given)} instead of {_kind(self.expected)}"

    @property
    def differs(self) -> bool:
        return bool(self.structure) or self.error > self.budget


def compare_files(
    first: Path,
    second: Path,
    *,
    inputs: Path | None = None,
    seed: int = 0,
    allows: Allows | None = None,
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
) -> Unit:
    """Return whether ``second`` gives the outputs of ``first``, each with onnxruntime's optimiser on and off.

    Args:
        first: what is right.
        second: what is judged.
        inputs: values by input name or position; without them they are drawn from the types of the graph's inputs.
        seed: of what is drawn.
        allows, fail_on, progress: as in ``gradcheck``.

    Raises:
        TargetError: a file cannot be read or run; GC141 their inputs or outputs are not the same; GC104, GC122 of
            ``inputs``.
        TrustError: external data lie outside a file's folder.
    """
    start = time.perf_counter()
    say = progress or (lambda text: None)
    accepted = allows or Allows(())
    a, b = read(first), read(second)
    feeds_of_b, names_of_b = _ports(a, b)
    example = _given(inputs, a) if inputs is not None else _drawn_to_run(a, seed)
    worst: dict[str, _Row] = {}
    tried: list[str] = []
    for optimised in (True, False):
        say(f"running {first} and {second}")
        running, other = session(a, optimised=optimised), session(b, optimised=optimised)
        perturbed = [session(a, optimised=optimised, values=_perturbed_weights(a, seed + k)) for k in range(_PERTURBED)]
        for name, feeds in _trials(example, seed):
            trial = name if optimised else f"{name}, optimiser off"
            try:
                expected = run(running, feeds)
            except RuntimeError:
                if name == "example":
                    raise TargetError("GC602", f"{first} does not run on these inputs: see --inputs.") from None
                continue
            tried.append(trial)
            given = _run_or_raise(other, {mine: feeds[theirs] for mine, theirs in feeds_of_b.items()}, second)
            noisy = [run(each, _perturbed(feeds, seed + k)) for k, each in enumerate(perturbed)]
            for row in _rows(trial, expected, {names_of_b[key]: value for key, value in given.items()}, noisy):
                if row.name not in worst or _severity(row) > _severity(worst[row.name]):
                    worst[row.name] = row
    rows = sorted(worst.values(), key=_severity, reverse=True)
    tensors = [_result(row) for row in rows]
    findings = accepted.apply([_finding(row, first, second) for row in rows if row.differs and not row.unstable])
    return Unit(
        target=str(second),
        form="onnx",
        reference=str(first),
        verdict=unit_verdict("complete", findings, tensors, fail_on),
        seconds=time.perf_counter() - start,
        variations=tuple(tried),
        tensors=tuple(tensors),
        findings=tuple(findings),
    )


def _ports(a: OnnxFile, b: OnnxFile) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names in ``a`` of the inputs and of the outputs of ``b``: the same, or else those in their order."""
    differing: list[str] = []
    found = []
    for kind, mine, theirs in (
        ("input", a.inputs, b.inputs),
        ("output", list(a.model.graph.output), list(b.model.graph.output)),
    ):
        names, others = [each.name for each in mine], [each.name for each in theirs]
        if len(names) != len(others):
            differing.append(f"{len(others)} {kind}s ({', '.join(others)}), not {len(names)} ({', '.join(names)})")
            continue
        matched = (
            {name: name for name in others} if set(names) == set(others) else dict(zip(others, names, strict=True))
        )
        types = {each.name: described(each) for each in mine}
        for port in theirs:
            if not _compatible(types[matched[port.name]], described(port)):
                differing.append(
                    f"{kind} {port.name} is {_text(port)}, not {_text(mine[names.index(matched[port.name])])}"
                )
        found.append(matched)
    if differing:
        raise TargetError("GC141", f"{b.path} does not stand in for {a.path}: {'; '.join(differing)}.")
    return found[0], found[1]


def _compatible(mine: tuple[str, list[int | str] | None], theirs: tuple[str, list[int | str] | None]) -> bool:
    """Return whether dtypes are the same, and fixed sizes too."""
    if mine[0] != theirs[0]:
        return False
    if mine[1] is None or theirs[1] is None:
        return True
    return len(mine[1]) == len(theirs[1]) and all(
        left == right or isinstance(left, str) or isinstance(right, str)
        for left, right in zip(mine[1], theirs[1], strict=True)
    )


def _text(port: onnx.ValueInfoProto) -> str:
    dtype, sizes = described(port)
    return dtype if sizes is None else f"{dtype}[{', '.join(map(str, sizes))}]"


def _given(path: Path, file: OnnxFile) -> dict[str, Tensor]:
    """Return the inputs of a file of tensors, by the names of the graph's inputs."""
    content = read_tensors(path, INPUT_SUFFIXES, "Save tensors only: in a dict by name, with numpy.savez.")
    names = [each.name for each in file.inputs]
    if isinstance(content, Tensor):
        content = (content,)
    if isinstance(content, Mapping) and set(content) != set(names):
        positions = [str(key).removeprefix("arr_") for key in content]
        if positions != [str(k) for k in range(len(names))]:
            raise TargetError(
                "GC104",
                f"{path} has {', '.join(map(str, content)) or 'nothing'}; {file.path} takes {', '.join(names)}.",
            )
        content = tuple(content.values())
    if not isinstance(content, Mapping):
        if len(content) != len(names):
            raise TargetError("GC104", f"{path} has {len(content)} inputs; {file.path} takes {', '.join(names)}.")
        content = dict(zip(names, content, strict=True))
    return {name: torch.as_tensor(content[name]) for name in names}


def _drawn_to_run(file: OnnxFile, seed: int) -> dict[str, Tensor]:
    """Return inputs of the graph's types that it runs on."""
    running, said = session(file), ""
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
        "GC104", f"{file.path} runs on no inputs that were drawn for it ({said}); give some with --inputs."
    )


def _drawn(port: onnx.ValueInfoProto, size: int, largest: int, seed: int) -> Tensor:
    dtype_name, sizes = described(port)
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype) or sizes is None:
        raise TargetError(
            "GC104", f"nothing can be drawn for input {port.name!r} of {_text(port)}; give it with --inputs."
        )
    generator = torch.Generator().manual_seed(seed)
    shape = [each if isinstance(each, int) else size for each in sizes]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(0, largest + 1, shape, generator=generator).to(dtype)


def _trials(example: dict[str, Tensor], seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Give the inputs, and the same redrawn and with flipped signs."""
    generator = torch.Generator().manual_seed(seed + 1)
    yield "example", example
    yield "seed", {name: redrawn(value, generator) for name, value in example.items()}
    yield "flipped signs", {name: -value if value.is_floating_point() else value for name, value in example.items()}


def _perturbed(values: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return floats changed by an ULP up or down."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _nudged(value, generator) for name, value in values.items()}


def _nudged(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    up_or_down = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (value.double() * (1 + torch.finfo(value.dtype).eps * up_or_down)).to(value.dtype)


def _perturbed_weights(file: OnnxFile, seed: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _nudged(value, generator).numpy()
        for name, value in initializers(file)
        if value.is_floating_point() and value.ndim >= _WEIGHT_AXES
    }


def _run_or_raise(running: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        return run(running, feeds)
    except RuntimeError as error:
        raise TargetError(
            "GC602", f"{path} does not run on inputs that the other file takes: {first_line(error)}."
        ) from error


def _rows(
    trial: str, expected: dict[str, Tensor], given: dict[str, Tensor], noisy: list[dict[str, Tensor]]
) -> Iterator[_Row]:
    neighbours = max((scale_of(value) for value in expected.values()), default=0.0)
    for name, mine in expected.items():
        theirs = given[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            yield _Row(name, trial, float("inf"), 0.0, mine, theirs)
            continue
        budget = 0.0
        unstable = False
        for value in (each[name] for each in noisy):
            if value.shape != mine.shape:
                continue
            error, allowed = agreement(value, mine, theirs, neighbours)
            budget = max(budget, allowed)
            unstable = unstable or not torch.equal(torch.nan_to_num(value), torch.nan_to_num(mine))
        is_exact = not (mine.is_floating_point() or mine.is_complex())
        error, floor = agreement(mine, mine, theirs, neighbours)
        # An index that one ULP moves (a tie of argmax) may lie either way: then nothing can be said of it.
        yield _Row(name, trial, error, max(budget, floor), mine, theirs, unstable and is_exact and error > 0)


def _severity(row: _Row) -> float:
    return float("inf") if row.structure or not row.budget else row.error / row.budget


def _result(row: _Row) -> TensorResult:
    verdict: TensorVerdict = "same" if not row.differs else "unresolved" if row.unstable else "differs"
    return TensorResult(
        quantity="output",
        tensor=row.name,
        verdict=verdict,
        shape=tuple(row.expected.shape),
        dtype=str(row.expected.dtype).removeprefix("torch."),
        error=number(row.error),
        budget=number(row.budget),
    )


def _finding(row: _Row, first: Path, second: Path) -> Finding:
    where = "" if row.trial == "example" else f" with {row.trial}"
    if row.structure:
        message = f"{row.name} is {row.structure} in {second}{where}."
    else:
        message = (
            f"{row.name} of {second} differs from {first}'s{where}: by {row.error:.2e} (relative, rounding explains "
            f"{row.budget:.2e})."
        )
    return Finding(
        code="GC301",
        severity="error",
        quantity="output",
        tensor=row.name,
        verdict="differs",
        message=message,
        allow=f"GC301:{row.name}",
        fingerprint=fingerprint("GC301", str(second), "onnx", "output", row.name),
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
