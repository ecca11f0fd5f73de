"""A graph on all its trials, and other graphs held against it: checker, shapes, types of inputs and outputs, values.

onnxruntime's own optimiser is off on both sides, or it would repair what a pass broke.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
from torch import Tensor

from gradctl.comparison.file_inputs import extremes, resized, trials
from gradctl.comparison.file_outputs import OutputRow, noisy_trials, output_rows, worst_rows
from gradctl.core.errors import TargetError
from gradctl.numerics.measures import same_values
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import described, run
from gradctl.subject.frames import first_line

__all__ = ["InvalidGraph", "VerifiedGraph", "shelved", "stored"]

Outputs = dict[str, Tensor]

# Initializers from here on are weights: shape inference reads sizes, which are smaller.
_SHELVED_BYTES = 2**20


class InvalidGraph(Exception):
    """What a pass gave is no graph that stands in for the one before; says why, in a sentence without a full stop."""


def stored(model: onnx.ModelProto, path: Path) -> OnnxFile:
    """Return a graph as a file, which sessions read by themselves."""
    onnx.save(model, path)
    return OnnxFile(path, model)


def shelved(model: onnx.ModelProto, path: Path) -> OnnxFile:
    """Return a graph as a file, its large weights in another one beside it and not in memory; ``model`` is used up."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=_SHELVED_BYTES)
    # Read again: a message keeps the memory of a field that is cleared.
    return OnnxFile(path, onnx.load(path, load_external_data=False))


class VerifiedGraph:
    """The outputs of a graph on all trials, the noise of its rounding, and those of the last graph that held.

    Args:
        file: the graph before all passes.
        example: its inputs.
        seed: of the other trials, and of the noise.

    Raises:
        TargetError: GC602 if onnxruntime cannot run it; GC104 if not on the example.
    """

    def __init__(self, file: OnnxFile, example: Mapping[str, Tensor], seed: int) -> None:
        self.seed = seed
        self.ports = _ports(file.model)
        self.infers = _inference_error(file.model) is None
        self.feeds = dict(_all_trials(file, example, seed))
        self.outputs: dict[str, Outputs] = {}
        running = session(file, optimised=False)
        for trial, feeds in self.feeds.items():
            try:
                self.outputs[trial] = run(running, feeds)
            except RuntimeError as error:
                if trial == "example":
                    said = first_line(error)
                    raise TargetError("GC104", f"{file.path} does not run on these inputs: {said}.") from error
        again = run(running, self.feeds["example"])
        del running
        self.unrepeated = [
            name for name, value in again.items() if not same_values(value, self.outputs["example"][name])
        ]
        self.noisy = noisy_trials(file, {trial: self.feeds[trial] for trial in self.outputs}, seed)
        self.feeds = {trial: self.feeds[trial] for trial in self.noisy}
        self.original = self.outputs

    def rows(self, file: OnnxFile) -> list[OutputRow]:
        """Return each output of a graph at its worst, against the last graph that held.

        Raises:
            InvalidGraph: it is not valid, has other inputs or outputs, or does not run where the graph before did.
        """
        self._ensure_valid(file)
        found = self._run(_session(file, optimised=False))
        self._found = found
        return self._held(found, self.outputs)

    def keep(self) -> None:
        """Hold what comes next against the graph that ``rows`` was given last."""
        self.outputs = self._found

    def rows_in_total(self, file: OnnxFile) -> list[OutputRow]:
        """Return each output at its worst against the graph before all passes, onnxruntime's optimiser off and on.

        Raises:
            InvalidGraph: as ``rows``.
        """
        self._ensure_valid(file)
        worst: dict[str, OutputRow] = {}
        for optimised in (False, True):
            said = "onnxruntime's optimiser on" if optimised else ""
            try:
                found = self._run(_session(file, optimised=optimised))
            except InvalidGraph as refusal:
                raise InvalidGraph(f"{refusal} ({said})" if optimised else str(refusal)) from refusal
            rows = self._held(found, self.original)
            worst_rows((replace(row, trial=f"{row.trial}, {said}") if optimised else row for row in rows), worst)
        return list(worst.values())

    def _held(self, found: Mapping[str, Outputs], expected: Mapping[str, Outputs]) -> list[OutputRow]:
        worst: dict[str, OutputRow] = {}
        for trial, outputs in found.items():
            worst_rows(output_rows(trial, expected[trial], outputs, self.noisy[trial]), worst)
        return list(worst.values())

    def _run(self, running: onnxruntime.InferenceSession) -> dict[str, Outputs]:
        found: dict[str, Outputs] = {}
        for trial, feeds in self.feeds.items():
            try:
                found[trial] = run(running, feeds)
            except RuntimeError as error:
                said = first_line(error).removeprefix("RuntimeError: ")
                raise InvalidGraph(f"it does not run with {trial}: {said}") from error
        return found

    def _ensure_valid(self, file: OnnxFile) -> None:
        try:
            onnx.checker.check_model(file.path)
        except Exception as error:  # the checker has an error of its own, and RuntimeError where an opset is missing
            raise InvalidGraph(f"ONNX's checker refuses it: {_said(error)}") from error
        ports = _ports(file.model)
        if ports != self.ports:
            lost = [f"{kind} {name}" for kind, name in self.ports.keys() - ports.keys()]
            other = [f"{kind} {name}" for (kind, name), dtype in ports.items() if self.ports.get((kind, name)) != dtype]
            raise InvalidGraph(f"it has other inputs or outputs: {', '.join(sorted({*lost, *other}))}")
        if self.infers and (error_text := _inference_error(file.model)) is not None:
            raise InvalidGraph(f"shapes do not fit: {error_text}")


def _all_trials(file: OnnxFile, example: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, Outputs]]:
    yield from trials(example, seed)
    yield from extremes(example, seed)
    yield from resized(file, example)


def _session(file: OnnxFile, *, optimised: bool) -> onnxruntime.InferenceSession:
    try:
        return session(file, optimised=optimised)
    except TargetError as error:
        raise InvalidGraph(error.message.replace(str(file.path), "it").rstrip(".")) from error


def _ports(model: onnx.ModelProto) -> dict[tuple[str, str], str]:
    own = {each.name for each in model.graph.initializer}
    sides: tuple[tuple[str, Callable[[], Iterator[onnx.ValueInfoProto]]], ...] = (
        ("input", lambda: (each for each in model.graph.input if each.name not in own)),
        ("output", lambda: iter(model.graph.output)),
    )
    return {(kind, port.name): described(port)[0] for kind, ports in sides for port in ports()}


def _inference_error(model: onnx.ModelProto) -> str | None:
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # InferenceError, and what protobuf raises on the way
        return _said(error)
    return None


def _said(error: BaseException) -> str:
    return " ".join(str(error).partition("\n\n")[0].split()).rstrip(".")
