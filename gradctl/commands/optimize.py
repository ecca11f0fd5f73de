"""``gradctl optimize``: passes over an ONNX graph, each compared with the graph before it, and the improvement.

A pass that changes what the graph computes is undone and named, and the others go on without it. Without an output file
it is a trial: the same passes and verdict, and no file.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from gradctl.commands.compare import Comparing, refused_unit
from gradctl.comparison.difference import FileDifference
from gradctl.comparison.difference_findings import output_result
from gradctl.comparison.file_inputs import draw_inputs, read_inputs
from gradctl.comparison.reference import Reference
from gradctl.comparison.verified_graph import InvalidGraph
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError
from gradctl.core.findings import Finding, TensorResult, Unit, fingerprint
from gradctl.core.numbers import number
from gradctl.core.optimization import Optimization
from gradctl.core.verdicts import unit_verdict
from gradctl.forms.artifact import place, staged_file, unwritable
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.onnx import forward as onnx_form
from gradctl.forms.onnx.from_file import wrap_file
from gradctl.forms.table import form_named
from gradctl.onnxio.onnx_file import OnnxFile, read
from gradctl.passes.opset import conversion
from gradctl.passes.pass_result import Pass
from gradctl.passes.pipeline import Pipeline
from gradctl.passes.table import passes_of_level
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject

# Protobuf takes 2 GiB, and passes hold a graph with its weights as one message.
_LARGEST = 2**31 - 2**27


@dataclass(frozen=True, slots=True)
class Options:
    """How a graph is optimised.

    Attributes:
        passes: in this order.
        level: to which they belong; None if the user named them.
        seed: of inputs and noise.
        allows, fail_on, progress: as in ``gradcheck``.
    """

    passes: Sequence[Pass]
    level: str | None = None
    seed: int = 0
    allows: Allows = Allows(())  # noqa: RUF009  # it is empty, and nothing is ever matched by it
    fail_on: str = "error"
    progress: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, slots=True)
class Optimized:
    """The result for one graph.

    Attributes:
        unit: the verdict, with the table of passes.
        written: whether the output was written.
    """

    unit: Unit
    written: bool


def chosen_passes(level: str, named: Sequence[Pass], opset: int | None) -> list[Pass]:
    """Return the passes to run: those named, or else those of the level, after a conversion to ``opset``."""
    converted = [conversion(opset)] if opset is not None else []
    return [*converted, *(named or passes_of_level(level))]


def optimize_file(path: Path, output: Path | None, options: Options, *, inputs: Path | None = None) -> Optimized:
    """Return the verdict on the optimised graph of a file, which is written if it passes.

    Args:
        path: the file; never changed, unless it is ``output`` too.
        output: the file to write; None for a trial.
        options: passes and the rest.
        inputs: values by input name or position; by default random values of the types of the graph's inputs.

    Raises:
        TargetError: the file cannot be read or run; GC104, GC122 of ``inputs``.
        TrustError: external data lie outside the file's folder.
        ResourceError: GC131 if the output cannot be written.
    """
    start = time.perf_counter()
    file = read(path)
    example = read_inputs(inputs, file) if inputs is not None else draw_inputs(file, options.seed, optimised=False)
    _ensure_small(file)
    del file  # it may hold all weights
    with _staged(output) as beside:
        unit, final = _optimized_or_refused(path, example, beside, options, str(path), output=output)
        unit = msgspec.structs.replace(unit, reference=str(path), seconds=time.perf_counter() - start)
        return _placed(unit, final, beside, output)


def optimize_target(
    subject: Subject,
    output: Path | None,
    options: Options,
    *,
    dynamic: Dynamic | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Optimized:
    """Return the verdict on the optimised graph of a model, compared with eager too.

    Args:
        subject: the model and its inputs; not changed.
        output, options: as in ``optimize_file``.
        dynamic: sizes that stay free; the result is compared at other sizes as well.
        around: entered around all that runs the model.

    Raises:
        TargetError, NothingToCheck: as ``gradcheck``; GC104 for ``dynamic``.
        ResourceError: GC131 if the output cannot be written.
    """
    start = time.perf_counter()
    with _staged(output) as beside:
        with around(), preserve_generators():
            comparing = Comparing(subject, options.allows, fail_on=options.fail_on, outputs_only=True)
            options.progress("exporting")
            exported = beside.with_name(f"exported-{beside.name}")
            try:
                captured = _exported(comparing.reference, exported, dynamic)
            except CannotCapture as refusal:
                return Optimized(refused_unit(subject, "onnx", refusal, start), written=False)
            feeds = captured.call.feeds_of(*comparing.reference.instance().inputs())  # type: ignore[attr-defined]
            example = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
            _ensure_small(captured.artifact)
            del captured  # it holds all weights
            unit, final = _optimized_or_refused(exported, example, beside, options, subject.target, output=output)
            if final is not None and unit.verdict == "pass":
                options.progress("comparing the result with eager")
                result = wrap_file(read(final.path), comparing.reference.instance())
                eager = comparing.captured(result, form_named("onnx"))
                eager = comparing.at_other_sizes(eager, result, dynamic or {})
                unit = _joined(unit, eager, options.fail_on)
        unit = msgspec.structs.replace(unit, seconds=time.perf_counter() - start)
        for other in beside.parent.iterdir():
            if other != beside:
                other.unlink()
        return _placed(unit, final, beside, output)


@contextmanager
def _staged(output: Path | None) -> Iterator[Path]:
    """Yield a path for the result: next to the output, or in a temporary folder for a trial."""
    if output is not None:
        with staged_file(output) as beside:
            yield beside
    else:
        with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            yield Path(folder) / "trial.onnx"


def _placed(unit: Unit, final: OnnxFile | None, beside: Path, output: Path | None) -> Optimized:
    """Move a result that passes to the output, if there is one."""
    if output is None or final is None or unit.verdict != "pass":
        return Optimized(unit, written=False)
    place(beside, output)
    return Optimized(unit, written=True)


def _exported(reference: Reference, path: Path, dynamic: Dynamic | None) -> Captured:
    """Return the model as an ONNX file at ``path``, loaded.

    Raises:
        CannotCapture: the exporter rejects the model, or onnxruntime the file.
        TargetError: GC104 for ``dynamic``.
    """
    onnx_form.save(onnx_form.export_graph(reference.instance(), dynamic=dynamic).artifact, path)
    try:
        return wrap_file(read(path), reference.instance())
    except TargetError as error:
        if error.code not in ("GC601", "GC602"):
            raise
        raise CannotCapture(str(error)) from error


def _optimized_or_refused(
    path: Path, example: Mapping[str, Tensor], beside: Path, options: Options, target: str, *, output: Path | None
) -> tuple[Unit, OnnxFile | None]:
    """Raise GC131 if a graph cannot be written: the graph after each pass is a file beside the result."""
    try:
        return _optimized(path, example, beside, options, target)
    except OSError as error:
        raise unwritable(output or beside, error) from error


def _optimized(
    path: Path, example: Mapping[str, Tensor], beside: Path, options: Options, target: str
) -> tuple[Unit, OnnxFile | None]:
    """Return the verdict on a graph, and the file that lies at ``beside``; None where nothing could be verified."""
    pipeline = Pipeline(path, example, beside.parent, seed=options.seed, progress=options.progress)
    if pipeline.verified.unrepeated:
        names = ", ".join(pipeline.verified.unrepeated)
        reason = f"the graph differs from itself when run twice, so no pass can be compared with it: {names}."
        pipeline.clear()
        return Unit(target=target, form="onnx", verdict="inconclusive", reason=reason), None
    pipeline.run(options.passes)
    options.progress("measuring")
    final = pipeline.save(beside)
    findings = [_finding(target, each) for each in pipeline.findings]
    rows: list[FileDifference] = []
    try:
        rows = pipeline.verified.total_differences(final)
    except InvalidGraph as refusal:
        findings.append(_invalid_total(target, str(refusal)))
    worst = next(iter(rows), None)
    findings += [_total_finding(target, row) for row in rows if row.differs]
    optimization = pipeline.optimization(options.level, final)
    if worst is not None:
        optimization = msgspec.structs.replace(optimization, error=number(worst.error), budget=number(worst.budget))
    pipeline.clear()
    unit = make_unit(
        target,
        "onnx",
        findings,
        map(output_result, rows),
        allows=options.allows,
        fail_on=options.fail_on,
        variations=tuple(trial.name for trial in pipeline.verified.trials),
        optimization=optimization,
    )
    return unit, final


def _finding(target: str, finding: Finding) -> Finding:
    place_of = finding.allow or finding.code
    return msgspec.structs.replace(
        finding, fingerprint=fingerprint(finding.code, target, "onnx", finding.quantity, place_of)
    )


def _invalid_total(target: str, reason: str) -> Finding:
    return Finding(
        code="GC502",
        severity="error",
        message=f"each pass agreed by itself, but their result does not: {reason}.",
        hint="leave passes out (--pass NAME for each that is to run), and report it to the optimisers' authors.",
        fingerprint=fingerprint("GC502", target, "onnx", None, None),
    )


def _total_finding(target: str, row: FileDifference) -> Finding:
    """Return that all passes together are off where each was not, or with onnxruntime's optimiser on."""
    return Finding(
        code="GC501",
        severity="error",
        quantity="output",
        tensor=row.name,
        verdict="differs",
        message=(
            f"each pass agreed by itself, but {row.name} of their result is off by {row.error:.2e} (relative, rounding "
            f"explains {row.budget:.2e}), with {row.trial.name}."
        ),
        hint="leave passes out (--pass NAME for each that is to run), and report it to the optimisers' authors.",
        allow=f"GC501:{row.name}",
        fingerprint=fingerprint("GC501", target, "onnx", "output", row.name),
    )


def _joined(unit: Unit, eager: Unit, fail_on: str) -> Unit:
    """Return the verdict on the result against eager, with the table and the findings of the passes."""
    optimization: Optimization | None = unit.optimization
    findings = (*unit.findings, *eager.findings)
    tensors: tuple[TensorResult, ...] = eager.tensors
    verdict = eager.verdict if eager.verdict != "pass" else unit_verdict("complete", findings, tensors, fail_on)
    return msgspec.structs.replace(
        eager, optimization=optimization, findings=findings, verdict=verdict, variations=eager.variations
    )


def _ensure_small(file: OnnxFile) -> None:
    """Raise GC142 unless a graph and its weights fit into one message."""
    tensors = file.model.graph.initializer
    size = file.path.stat().st_size + sum(
        int(entry.value) for tensor in tensors for entry in tensor.external_data if entry.key == "length"
    )
    if size > _LARGEST:
        raise TargetError(
            "GC142",
            f"{file.path} has {size / 2**30:.1f} GiB with its weights, and optimisers hold at most 2 in one message. "
            "Let onnxruntime optimise it when it is loaded.",
        )
