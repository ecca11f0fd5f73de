"""Passes in sequence, each verified; a pass that changes the results is undone and becomes a finding."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import onnx
from torch import Tensor

from gradctl.comparison.difference import FileDifference
from gradctl.comparison.timing import latencies
from gradctl.comparison.verified_graph import InvalidGraph, VerifiedGraph, shelve
from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.findings import Finding
from gradctl.core.names import Severity
from gradctl.core.numbers import number
from gradctl.core.optimization import GraphSize, Latency, Optimization, PassOutcome, PassStatus
from gradctl.diagnosis.first_change import FirstChange, first_change
from gradctl.graphdiff.graph_difference import compare_structure
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.validation import nodes
from gradctl.passes.pass_result import NotApplicable, Pass, PassResult, compare_models
from gradctl.passes.size import size_of
from gradctl.subject.frames import first_line

# The most bytes of weights in the sessions that measure latency, which exist at the same time.
_MOST_BYTES_MEASURED = 2**28
_MOST_NODES_NAMED = 6
_HINT = "the other passes ran without it; accept that, or name the passes to run with --pass."
# From this many bytes of weights on, garbage collection is worth its half second.
_MANY_BYTES = 2**26


class Pipeline:
    """A graph, the passes applied to it, and their findings.

    Args:
        path: of the graph before all passes, which ``read`` accepted.
        example: its inputs.
        folder: for the intermediate graphs; ``clear`` removes them.
        seed: of inputs and noise.
        progress: called with a line before each pass.

    Raises:
        TargetError: GC602 if onnxruntime cannot run the graph; GC104 if not on the example.
    """

    def __init__(
        self,
        path: Path,
        example: Mapping[str, Tensor],
        folder: Path,
        *,
        seed: int,
        progress: Callable[[str], None],
    ) -> None:
        self.folder, self.seed, self.progress = folder, seed, progress
        progress("running the unchanged graph")
        self.current = shelve(onnx.load(path), folder / "graph-0.onnx")
        try:
            self.verified = VerifiedGraph(self.current, example, seed)
        except TargetError as error:
            said = error.message.replace(str(self.current.path), str(path))
            raise TargetError(error.code, said) from error
        self.shapes = {name: tuple(value.shape) for name, value in example.items()}
        self.before = self._size(self.current.model)
        self.whole = onnx.load(self.current.path)
        self.first, self.stages = self.current, [self.current.path]
        self.outcomes: list[PassOutcome] = []
        self.findings: list[Finding] = []

    def run(self, passes: Sequence[Pass], *, on_trial: bool = True) -> None:
        """Run passes over the current graph, and keep each result if it is verified and has no more nodes.

        A pass that adds nodes is kept on trial while others follow, which may remove more than it added. If they do
        not, all passes since are undone, and they run without it.
        """
        total = len(self.outcomes) + len(passes)
        for index, each in enumerate(passes):
            self.progress(f"pass {len(self.outcomes) + 1} of {total}: {each.name}")
            rest = passes[index + 1 :]
            before = self.current, list(self.stages), list(self.outcomes), list(self.findings), self.verified.trials
            grown = self._run(each, may_grow=on_trial and bool(rest))
            if not grown:
                continue
            self.run(rest, on_trial=False)
            if not _grown(before[0].model, self.current.model):
                return
            tried = self.outcomes[len(before[2])]
            for path in self.stages[len(before[1]) :]:
                self._remove(path)
            self.current, self.stages, self.outcomes, self.findings, self.verified.trials = before
            self.whole = onnx.load(self.current.path)
            self._note(each, "set aside", changed=tried.changed, reason=grown, seconds=tried.seconds)

    def _run(self, each: Pass, *, may_grow: bool) -> str:
        """Run one pass; if the pass was kept although the graph has grown, return by how much."""
        start = time.perf_counter()
        made = self._apply(each, start)
        if made is None:
            return ""
        seconds = time.perf_counter() - start
        grown = "" if each.may_grow or not made.modified else _grown(self.current.model, made.model)
        if not made.modified:
            self._note(each, "unchanged", seconds=seconds)
        elif grown and not may_grow:
            self._note(each, "set aside", changed=made.changed, reason=grown, seconds=seconds)
        else:
            start, changed = time.perf_counter(), made.changed
            candidate = shelve(made.model, self.folder / f"graph-{len(self.outcomes) + 1}.onnx")
            del made
            self._verify(each, candidate, changed, seconds, start)
        if self.before.bytes > _MANY_BYTES:
            gc.collect()  # onnx-ir's graphs are reference cycles that hold the weights of their models
        return grown if self.outcomes[-1].status == "kept" else ""

    def _apply(self, each: Pass, start: float) -> PassResult | None:
        """Return the result of a pass on the current graph; None if it has none, which is noted."""
        if reason := each.missing():
            self._note(each, "not installed", reason=reason)
            return None
        try:
            return compare_models(self.whole, each.apply(self.whole))
        except NotApplicable as refusal:
            self._note(each, "not applicable", reason=str(refusal), seconds=time.perf_counter() - start)
        except Exception as error:  # a pass may raise anything
            if is_out_of_memory(error):
                raise
            # It produced no wrong graph, and the other passes can continue: an error only if it was requested.
            severity: Severity = "warning" if each.level is not None else "error"
            self._failed(each, f"it raises {first_line(error)}", time.perf_counter() - start, severity=severity)
        return None

    def _verify(self, each: Pass, candidate: OnnxFile, changed: str, seconds: float, start: float) -> None:
        try:
            differences = self.verified.differences(candidate)
        except InvalidGraph as refusal:
            self._remove(candidate.path)
            self._failed(each, str(refusal), seconds, time.perf_counter() - start)
            return
        spent = time.perf_counter() - start
        worst = next(iter(differences), None)
        numbers = {"error": number(worst.error), "budget": number(worst.budget)} if worst else {}
        fields: dict[str, object] = {"changed": changed, "seconds": seconds, **numbers}
        if worst is None or not worst.differs:
            self.verified.keep()
            self.current, self.whole = candidate, onnx.load(candidate.path)
            self.stages.append(candidate.path)
            fields |= {"size": self._size(candidate.model), "tied_to_machine": each.tied_to_machine}
            self._note(each, "kept", verification_seconds=spent, **fields)
            return
        before = replace(self.current, model=self.whole)
        where = first_change(before, candidate, each.apply, worst.trial, self.seed)
        self._remove(candidate.path)
        self.findings.append(_changed(each, worst, where))
        spent = time.perf_counter() - start
        self._note(each, "undone", reason=f"it changes {worst.name}", verification_seconds=spent, **fields)

    def save(self, path: Path) -> OnnxFile:
        """Return the current graph as a file with all its weights, and release them from memory."""
        onnx.save(self.whole, path)
        del self.whole
        return replace(self.current, path=path)

    def optimization(self, level: str | None, final: OnnxFile) -> Optimization:
        """Return the table: sizes, and latencies of all graphs, or of the two ends if all would not fit into memory."""
        feeds = self.verified.trials[0].feeds
        files = [OnnxFile(path, final.model) for path in self.stages[:-1]] + [final]
        after = self._size(final.model)
        sizes = [self.before, *(each.size for each in self.outcomes if each.size), after]
        total = sum(size.bytes for size in sizes)
        measured = files if total <= _MOST_BYTES_MEASURED else [files[0], files[-1]]
        found: list[Latency | None] = [None] * len(measured)
        # If onnxruntime's own optimiser breaks a graph, the last comparison reports it.
        with suppress(TargetError, RuntimeError):
            found = [*latencies(measured, feeds)]
        of_kept = iter(found[1:] if len(measured) == len(files) else [None] * len(files))
        outcomes = tuple(
            msgspec.structs.replace(each, latency=next(of_kept)) if each.status == "kept" else each
            for each in self.outcomes
        )
        return Optimization(
            level=level,
            before=self.before,
            after=after,
            passes=outcomes,
            latency_before=found[0],
            latency_after=found[-1],
            tied_to_machine=any(each.tied_to_machine for each in outcomes),
            opsets=final.opsets,
            parts=compare_structure(self.first, self.current).structure.parts,
        )

    def clear(self) -> None:
        """Remove the intermediate graphs."""
        for path in self.folder.iterdir():
            if path.name.startswith(("graph-", "values-of-", "part")):
                path.unlink()

    def _remove(self, graph: Path) -> None:
        for path in self.folder.glob(f"{graph.name}*"):
            path.unlink()

    def _size(self, model: onnx.ModelProto) -> GraphSize:
        return size_of(model, self.shapes)

    def _failed(
        self,
        each: Pass,
        reason: str,
        seconds: float,
        verification_seconds: float = 0.0,
        *,
        severity: Severity = "error",
    ) -> None:
        self.findings.append(
            Finding(
                code="GC502",
                severity=severity,
                message=f"pass {each.name} ({each.backend}) was undone: {reason}.",
                hint=_HINT,
                allow=f"GC502:{each.name}",
            )
        )
        self._note(each, "failed", reason=reason, seconds=seconds, verification_seconds=verification_seconds)

    def _note(self, each: Pass, status: PassStatus, **fields: object) -> None:
        outcome = PassOutcome(name=each.name, backend=each.backend, status=status)
        self.outcomes.append(msgspec.structs.replace(outcome, **fields))


def _grown(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    counts = [sum(1 for _ in nodes(model)) for model in (before, after)]
    return f"it makes {counts[1]} nodes of {counts[0]}" if counts[1] > counts[0] else ""


def _changed(each: Pass, row: FileDifference, where: FirstChange | None) -> Finding:
    """Return the finding of a pass that changes what the graph computes."""
    off = row.structure or f"off by {row.error:.2e} (relative, rounding explains {row.budget:.2e})"
    text = f"pass {each.name} ({each.backend}) changes {row.name}: {off}, with {row.trial.name}"
    if where is not None:
        text += f"; the first value it changes is {where.value} of {where.node}: {where.change}"
        if where.nodes:
            named = ", ".join(where.nodes[-_MOST_NODES_NAMED:])
            more = len(where.nodes) - _MOST_NODES_NAMED
            named = f"{more} more, {named}" if more > 0 else named
            text += f"; {len(where.nodes)} of {where.total} nodes show it: {named}"
    return Finding(
        code="GC501",
        severity="error",
        quantity="output",
        tensor=row.name,
        verdict="differs",
        message=f"{text}. It was undone.",
        hint=_HINT,
        allow=f"GC501:{each.name}",
    )
