"""``gradctl compare A.onnx B.onnx``: whether two files compute the same outputs, up to rounding.

The report also describes how the graphs differ; only the values decide the verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from gradctl.comparison.compare import Comparison
from gradctl.comparison.difference import FileDifference, Key
from gradctl.comparison.difference_findings import output_result
from gradctl.comparison.file_inputs import draw_inputs, read_inputs, variations
from gradctl.comparison.file_trials import file_trials
from gradctl.comparison.program import FileProgram
from gradctl.comparison.trials import FileTrial
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, Location, Unit
from gradctl.core.structure import GraphNode
from gradctl.diagnosis.first_divergence import FirstDivergence, SharedValues
from gradctl.graphdiff.graph_difference import compare_structure
from gradctl.onnxio.onnx_file import OnnxFile, read, session
from gradctl.onnxio.session import describe_port, port_text
from gradctl.subject.frames import first_line


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
    """Return whether ``second`` computes the outputs of ``first``, and how the two graphs differ.

    Both run with onnxruntime's optimiser on and off.

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
    ports = _ports(a, b)
    example = read_inputs(inputs, a) if inputs is not None else draw_inputs(a, seed)
    say(f"matching {first} and {second}")
    compared = compare_structure(a, b)
    say(f"running {first} and {second}")
    comparison = _comparison(a, b, ports, example, seed)
    differing = [row for row in comparison.differing if not row.is_unstable]
    shared = SharedValues(a, b, compared.values, ports[0], seed)
    divergences = {trial: shared.first_divergence(trial) for trial in dict.fromkeys(row.trial for row in differing)}
    return make_unit(
        str(second),
        "onnx",
        [_finding(row, first, second, divergences[row.trial]) for row in differing],
        map(output_result, comparison.by_severity),
        allows=accepted,
        fail_on=fail_on,
        reference=str(first),
        seconds=time.perf_counter() - start,
        variations=tuple(comparison.tried),
        structure=compared.structure,
    )


def _comparison(
    a: OnnxFile, b: OnnxFile, ports: tuple[dict[str, str], dict[str, str]], example: Mapping[str, Tensor], seed: int
) -> Comparison[FileTrial]:
    """Return the comparison of two files, onnxruntime's optimiser on and off."""
    feeds, outputs = ports[0], {name: own for own, name in ports[1].items()}
    worst: dict[Key, FileDifference] = {}
    tried: list[str] = []
    for optimised in (True, False):
        trials = _trials(a, example, seed, optimised=optimised)
        candidate = FileProgram(str(b.path), session(b, optimised=optimised), feeds, outputs)
        comparison: Comparison[FileTrial] = Comparison(candidate, tried, worst=worst)
        comparison.add(trials)
        for error in comparison.raised.values():
            said = f"{b.path} does not run on inputs that the other file accepts: {first_line(error)}."
            raise TargetError("GC602", said) from error
    return comparison


def _trials(file: OnnxFile, example: Mapping[str, Tensor], seed: int, *, optimised: bool) -> list[FileTrial]:
    try:
        trials = file_trials(file, variations(example, seed), seed, optimised=optimised)
    except TargetError as refusal:
        if refusal.code != "GC104":
            raise
        raise TargetError("GC602", f"{file.path} does not run on these inputs: see --inputs.") from None
    return trials if optimised else [replace(trial, name=f"{trial.name}, optimiser off") for trial in trials]


def _ports(a: OnnxFile, b: OnnxFile) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names in ``a`` of the inputs and of the outputs of ``b``: the same, or else those in their order."""
    differing: list[str] = []
    found = []
    for kind, ports, candidate_ports in (
        ("input", a.inputs, b.inputs),
        ("output", list(a.model.graph.output), list(b.model.graph.output)),
    ):
        names, others = [each.name for each in ports], [each.name for each in candidate_ports]
        if len(names) != len(others):
            differing.append(f"{len(others)} {kind}s ({', '.join(others)}), not {len(names)} ({', '.join(names)})")
            continue
        matched = (
            {name: name for name in others} if set(names) == set(others) else dict(zip(others, names, strict=True))
        )
        for port in candidate_ports:
            own = ports[names.index(matched[port.name])]
            if not _compatible(describe_port(own), describe_port(port)):
                differing.append(f"{kind} {port.name} is {port_text(port)}, not {port_text(own)}")
        found.append(matched)
    if differing:
        raise TargetError("GC141", f"{b.path} is not interchangeable with {a.path}: {'; '.join(differing)}.")
    return found[0], found[1]


def _compatible(first: tuple[str, list[int | str] | None], second: tuple[str, list[int | str] | None]) -> bool:
    """Return whether dtypes are the same, and fixed sizes too."""
    if first[0] != second[0]:
        return False
    if first[1] is None or second[1] is None:
        return True
    return len(first[1]) == len(second[1]) and all(
        left == right or isinstance(left, str) or isinstance(right, str)
        for left, right in zip(first[1], second[1], strict=True)
    )


def _finding(row: FileDifference, first: Path, second: Path, divergence: FirstDivergence | None) -> Finding:
    where = "" if row.trial.name == "example" else f" with {row.trial.name}"
    if row.structure:
        message = f"{row.name} is {row.structure} in {second}{where}."
    else:
        message = (
            f"{row.name} of {second} differs from {first}'s{where}: by {row.error:.2e} (relative, rounding explains "
            f"{row.budget:.2e})."
        )
    location = None
    if divergence is not None:
        value, off = divergence.value, divergence.difference
        far = f"is {off.structure}" if off.structure else f"is off by {off.error:.2e}"
        name = value.before if value.before == value.after else f"{value.before} ({value.after} in {second})"
        makers = _maker(value.node_before), _maker(value.node_after)
        made = makers[0] if makers[0] == makers[1] else f"{makers[0]} there, {makers[1]} here"
        message += f" The first value that differs, {name}, {far}: {made} makes it."
        location = Location(file=str(second), op=makers[1])
    return Finding(
        code="GC301",
        severity="error",
        quantity="output",
        tensor=row.name,
        verdict="differs",
        message=message,
        allow=f"GC301:{row.name}",
        location=location,
    )


def _maker(node: GraphNode) -> str:
    return f"{node.operator} {node.name!r}" if node.name else node.operator
