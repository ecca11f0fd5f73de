"""A graph on all its trials, and other graphs held against it: checker, shapes, types of inputs and outputs, values.

onnxruntime's own optimiser is off on both sides, or it would repair what a pass broke.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
from torch import Tensor

from gradctl.comparison.compare import Comparison
from gradctl.comparison.difference import FileDifference
from gradctl.comparison.file_inputs import extremes, variations, vary_sizes
from gradctl.comparison.file_trials import file_trials
from gradctl.comparison.program import FileProgram
from gradctl.comparison.trials import FileTrial
from gradctl.core.errors import TargetError
from gradctl.numerics.measures import same_values
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import describe_port
from gradctl.subject.frames import first_line

# Initializers from here on are weights: shape inference reads sizes, which are smaller.
_SHELVED_BYTES = 2**20


class InvalidGraph(Exception):
    """What a pass gave is no graph that stands in for the one before; says why, in a sentence without a full stop."""


def store(model: onnx.ModelProto, path: Path) -> OnnxFile:
    """Return a graph as a file, which sessions read by themselves."""
    onnx.save(model, path)
    return OnnxFile(path, model)


def shelve(model: onnx.ModelProto, path: Path) -> OnnxFile:
    """Return a graph as a file, its large weights in another one beside it and not in memory; ``model`` is used up."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=_SHELVED_BYTES)
    # Read again: a message keeps the memory of a field that is cleared.
    return OnnxFile(path, onnx.load(path, load_external_data=False))


class VerifiedGraph:
    """A graph on all trials, the noise of its rounding, and the last graph that agreed with it.

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
        self.trials = file_trials(file, _all_inputs(file, example, seed), seed)
        program = FileProgram(str(file.path), session(file, optimised=False))
        # Twice in one session: each new one starts its generators alike.
        first, again = (program.run(self.trials[0])[0].outputs for _ in range(2))
        self.unrepeated = [name for name, value in again.items() if not same_values(value, first[name])]
        self.original = self.trials

    def differences(self, file: OnnxFile) -> list[FileDifference]:
        """Return the largest difference of each output from the last graph that agreed, worst first.

        Raises:
            InvalidGraph: it is not valid, has other inputs or outputs, or does not run where the graph before did.
        """
        self._ensure_valid(file)
        comparison = self._compare(file, self.trials, optimised=False, keep_outcomes=True)
        self._found = comparison.outcomes
        return comparison.by_severity

    def keep(self) -> None:
        """Compare the next graph with the graph that ``differences`` was given last."""
        self.trials = [
            replace(trial, native=self._found[trial.name], oracle=self._found[trial.name]) for trial in self.trials
        ]

    def total_differences(self, file: OnnxFile) -> list[FileDifference]:
        """Return the differences from the graph before all passes, onnxruntime's optimiser off and on, worst first.

        Raises:
            InvalidGraph: as ``differences``.
        """
        self._ensure_valid(file)
        plain = self._compare(file, self.original, optimised=False)
        try:
            on = "onnxruntime's optimiser on"
            renamed = [replace(trial, name=f"{trial.name}, {on}") for trial in self.original]
            optimised = self._compare(file, renamed, optimised=True)
        except InvalidGraph as refusal:
            raise InvalidGraph(f"{refusal} ({on})") from refusal
        worst = [max(plain.worst[key], optimised.worst[key], key=lambda each: each.severity) for key in plain.worst]
        return sorted(worst, key=lambda each: each.severity, reverse=True)

    def _compare(
        self, file: OnnxFile, trials: Sequence[FileTrial], *, optimised: bool, keep_outcomes: bool = False
    ) -> Comparison[FileTrial]:
        comparison: Comparison[FileTrial] = Comparison(FileProgram(str(file.path), _session(file, optimised=optimised)))
        comparison.add(trials, keep_outcomes=keep_outcomes)
        for trial, error in comparison.raised.items():
            said = first_line(error).removeprefix("RuntimeError: ")
            raise InvalidGraph(f"it does not run with {trial.partition(', onnxruntime')[0]}: {said}") from error
        return comparison

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


def _all_inputs(file: OnnxFile, example: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield from variations(example, seed)
    yield from extremes(example, seed)
    yield from vary_sizes(file, example)


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
    return {(kind, port.name): describe_port(port)[0] for kind, ports in sides for port in ports()}


def _inference_error(model: onnx.ModelProto) -> str | None:
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # InferenceError, and what protobuf raises on the way
        return _said(error)
    return None


def _said(error: BaseException) -> str:
    return " ".join(str(error).partition("\n\n")[0].split()).rstrip(".")
