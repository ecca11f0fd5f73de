"""``gradctl bench``: what a form costs, measured in a process of its own, and whether it is right.

The process loads the model, captures the form, calls it, and only then runs eager, in turn with the form: so the peak
of its memory is that of the form. It is compared last, as by ``compare``, in a second capture that no call has warmed.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from gradctl.commands.compare import compare_one, silenced_run
from gradctl.comparison.timing import TimedStep, medians_of, rounds_of
from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.findings import Estimate, Finding, Measurement, Unit, fingerprint, note
from gradctl.core.target_options import MeasuringOptions
from gradctl.core.verdicts import unit_verdict
from gradctl.forms.artifact import save
from gradctl.forms.eager import capture as capture_eager
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.table import form_named
from gradctl.gradients.gradcheck import gradcheck
from gradctl.gradients.gradient_findings import location
from gradctl.gradients.size_sweep import merged
from gradctl.isolation.cleanup import UNIT_FOLDER
from gradctl.numerics.intervals import median_interval
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.sizes import parse_sizes, sized_subjects
from gradctl.subject.instance import Instance
from gradctl.subject.lazy_layers import has_lazy_parameters, infer_shapes
from gradctl.subject.subject import Subject
from gradctl.subject.torch_private import clear_compilation_metrics

_COMPILED = ("aot", "compile")
# Without 6 rounds there is no interval; a block of calls is long beside the switch from one form to the other.
_FEWEST_ROUNDS, _ROUNDS, _MOST_ROUNDS = 6, 20, 40
_CALLS_BEFORE_PEAK = 3


def bench_one(
    subject: Subject,
    form: str,
    options: MeasuringOptions,
    *,
    named: bool = True,
    allows: Sequence[str] = (),
    fail_on: str = "error",
) -> Unit:
    """Return the verdict on one form with what it costs at one batch size: what a process of its own does.

    Raises:
        TargetError: the model cannot be run, as ``gradcheck``, or not at this size.
    """
    if has_lazy_parameters(subject):
        subject = infer_shapes(subject)
    sizes = f"batch={options.batch}" if options.batch is not None else None
    others = [at_batch(subject, each) for each in options.other_batches] if form in _COMPILED else []
    subject = subject if options.batch is None else at_batch(subject, options.batch)
    with _empty_caches():
        with silenced_run():
            costs, findings = _measure(subject, form, options.seconds, others)
        if form == "eager":
            unit = gradcheck(subject, allows=allows, fail_on=fail_on)
        else:
            unit = compare_one(subject, form, named=named, allows=allows, fail_on=fail_on)
    marked = [
        msgspec.structs.replace(each, fingerprint=fingerprint(each.code, unit.target, form, None, str(each.location)))
        for each in findings
    ]
    found = (*unit.findings, *(marked if unit.status == "complete" else ()))
    verdict = unit.verdict if unit.verdict != "pass" else unit_verdict(unit.status, found, unit.tensors, fail_on)
    unit = msgspec.structs.replace(unit, timing=None, findings=found, verdict=verdict)
    reason = "; ".join(filter(None, (unit.reason, costs.pop("reason", None)))) or None
    cost = Measurement(sizes=sizes, verdict=verdict, status=unit.status, reason=reason, **costs)
    return msgspec.structs.replace(unit, reason=reason, measurements=(cost,))


def at_batch(subject: Subject, batch: int) -> Subject:
    """Return the subject with axis 0 of its inputs of this size.

    Raises:
        TargetError: as ``sized_subjects``; or the function beside the target raises for this size.
    """
    _, sized = next(iter(sized_subjects(subject, parse_sizes(f"batch={batch}"))))
    if isinstance(sized, TargetError):
        raise sized
    return sized


def merged_batches(units: Mapping[str | None, Unit]) -> Unit:
    """Return the unit of a form for its units by batch size, with the measurements of all."""
    measurements = tuple(
        each
        for sizes, unit in units.items()
        for each in unit.measurements
        or (Measurement(sizes=sizes, verdict=unit.verdict, status=unit.status, reason=unit.reason),)
    )
    named = {sizes: unit for sizes, unit in units.items() if sizes is not None}
    unit = merged(named, {}) if named else next(iter(units.values()))
    return msgspec.structs.replace(unit, measurements=measurements)


def _measure(
    subject: Subject, form: str, seconds: float, others: Sequence[Subject]
) -> tuple[dict[str, Any], list[Finding]]:
    """Return fields of a measurement, and notes on what Dynamo did; no fields but the reason if the form raises."""
    costs: dict[str, Any] = {}
    try:
        if form in _COMPILED:
            clear_compilation_metrics()  # imports Dynamo
        instance = _instance(subject)
        meter = _PeakMemory(instance)
        captured = form_named(form).capture(instance)
        has_gradients = "gradient" in captured.quantities and bool(instance.leaves)
        step = TimedStep(captured, instance, has_gradients)
        first = step().training
        for _ in range(_CALLS_BEFORE_PEAK - 1):
            step()
        costs |= {"capture": captured.seconds if form != "eager" else None, "first_call": first, **meter.read()}
        costs |= {"artifact_bytes": _artifact_bytes(captured), "nodes": sum(captured.operators.values()) or None}
        costs |= _times(step, None if form == "eager" else eager_step(subject, has_gradients), seconds)
        findings: list[Finding] = []
        if form in _COMPILED:
            findings, counts = _dynamo_notes(form, captured, subject, others, has_gradients)
            costs |= counts
    except CannotCapture:
        return {}, []  # the comparison says why
    except Exception as error:  # the form or the user's model may raise anything
        if is_out_of_memory(error):
            raise
        return {**costs, "reason": f"not measured: {first_line(error)}"}, []
    return costs | _paying(costs), findings


def _instance(subject: Subject) -> Instance:
    """Return a private copy whose inputs need a gradient only if nothing else does, as in training."""
    instance = Instance(subject, input_mode="constant", keep_hooks=True)
    return instance if instance.leaves else Instance(subject, input_mode="clone", keep_hooks=True)


def eager_step(subject: Subject, has_gradients: bool) -> TimedStep:
    """Return eager on a private copy, to be timed in turn with a form."""
    instance = _instance(subject)
    return TimedStep(capture_eager(instance), instance, has_gradients)


def _times(step: TimedStep, eager: TimedStep | None, seconds: float) -> dict[str, Any]:
    """Return the times of a form, and of eager in turn with it, as fields of a measurement."""
    steps = [step] if eager is None else [step, eager]
    start = time.perf_counter()
    rounds = rounds_of(
        steps,
        fewest=_FEWEST_ROUNDS,
        most=_MOST_ROUNDS,
        seconds=seconds,
        block_seconds=seconds / (_ROUNDS * len(steps)),
        seed=step.instance.subject.seed,
    )
    timing = time.perf_counter() - start
    found: dict[str, Any] = {}
    for part in ("forward", "training") if step.has_gradients else ("forward",):
        own, *others = (medians_of(blocks, part) for blocks in rounds)
        found[part] = _estimate(own)
        for theirs in others:
            found[f"eager_{part}"] = _estimate(theirs)
            found[f"{part}_ratio"] = _estimate([a / b for a, b in zip(own, theirs, strict=True)])
    measured = sum(call.training for blocks in rounds for block in blocks for call in block)
    return {**found, "rounds": len(rounds[0]), "seconds_measured": measured, "seconds_timing": timing}


def _estimate(samples: Sequence[float]) -> Estimate:
    median, lower, upper = median_interval(samples)
    return Estimate(median=median, lower=lower, upper=upper)


def _paying(costs: Mapping[str, Any]) -> dict[str, int | None]:
    """Return after how many calls the capture was worth it, if even the slow end of the ratio's interval is below 1."""
    kind = "training" if "training" in costs else "forward"
    own, eager, ratio = (costs.get(each) for each in (kind, f"eager_{kind}", f"{kind}_ratio"))
    if own is None or eager is None or ratio is None or ratio.upper is None or ratio.upper >= 1:
        return {}
    once = costs["capture"] + costs["first_call"] - own.median
    return {"pays_after": calls_to_pay(once, eager.median * ratio.median, eager.median)}


def calls_to_pay(once: float, per_call: float, eager_per_call: float) -> int | None:
    """Return after how many calls a form has taken less time than eager; None if it never has.

    That is the smallest n ≥ 1 with ``once + n · per_call < n · eager_per_call``.

    Args:
        once: seconds of the capture, and of what the first call takes beyond the others.
        per_call: seconds of a call of the form.
        eager_per_call: seconds of a call of eager.
    """
    gain = eager_per_call - per_call
    return max(1, math.floor(once / gain) + 1) if gain > 0 else None


def _artifact_bytes(captured: Captured) -> int | None:
    """Return the size of the file of a form; None if it has none, or torch cannot save it."""
    if captured.artifact is None:
        return None
    if isinstance(captured.artifact, OnnxFile):
        return int(captured.artifact.model.ByteSize())
    with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
        path = Path(folder) / "artifact"
        try:
            save(captured, path)
        except CannotCapture:
            return None
        return path.stat().st_size


def _dynamo_notes(
    form: str, captured: Captured, subject: Subject, others: Sequence[Subject], has_gradients: bool
) -> tuple[list[Finding], dict[str, int]]:
    """Return notes on graph breaks and on recompilations, of the calls so far and of calls at other sizes; and counts.

    The operators are those of the graphs that Dynamo makes in a new run.
    """
    # It takes a third of a second to import, and few forms need it.
    from gradctl.forms.compiled.account import graph_breaks, recompilations

    for other in others:
        TimedStep(captured, _instance(other), has_gradients)()
    again = recompilations()
    explained = graph_breaks(_instance(subject))
    findings = [
        note("GC701", f"{form} breaks the graph: {each.reason}.", location=location(each.place))
        for each in explained.breaks
    ]
    refused = {each.place for each in again if each.is_refused}
    again = [each for each in again if not each.is_refused]
    first = {each.place: each.reason for each in reversed(again)}
    for place, count in Counter(each.place for each in again).items():
        times = "once" if count == 1 else f"{count} times"
        end = " Then it runs as eager: that is Dynamo's limit." if place in refused else ""
        message = f"{form} is compiled again {times}. The guard that failed first: {first[place]}.{end}"
        findings.append(note("GC702", message, location=location(place)))
    counts = {"graph_breaks": len(explained.breaks), "recompilations": len(again)}
    return findings, {**counts, **({"nodes": explained.operators} if explained.operators else {})}


class _PeakMemory:
    """The peak of memory since now: of torch's allocator if the model is on a GPU, else resident memory."""

    def __init__(self, instance: Instance) -> None:
        devices = [leaf.tensor.device for leaf in instance.leaves]
        self._device = next((each for each in devices if each.type == "cuda"), None)
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._loaded = self._read("VmRSS", torch.cuda.memory_allocated)

    def read(self) -> dict[str, int | None]:
        """Return the bytes at the beginning, and the most since, as fields of a measurement."""
        return {"loaded_bytes": self._loaded, "peak_bytes": self._read("VmHWM", torch.cuda.max_memory_allocated)}

    def _read(self, resident: str, allocated: Any) -> int | None:
        return int(allocated(self._device)) if self._device is not None else _resident_bytes(resident)


def _resident_bytes(name: str) -> int | None:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process; elsewhere than on Linux the peak alone, or None.

    On Linux not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:
        if sys.platform in ("win32", "linux") or name != "VmHWM":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Let inductor compile anew what an earlier process has compiled: else the capture would take what is left."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    place = os.environ.get(UNIT_FOLDER)  # removed also if this process crashes
    with tempfile.TemporaryDirectory(prefix="gradctl-", dir=place, ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
