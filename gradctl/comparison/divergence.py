"""The inner values of two graphs that differ: output a few at a time, with onnxruntime's optimiser off."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from gradctl.comparison.compare import Comparison
from gradctl.comparison.difference import FileDifference
from gradctl.comparison.file_trials import file_trials
from gradctl.comparison.program import FileProgram
from gradctl.comparison.verified_graph import store
from gradctl.core.errors import TargetError
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.submodel import select_outputs

VALUES_A_RUN = 32


def differing_values(
    files: tuple[OnnxFile, OnnxFile],
    values: Sequence[tuple[str, str]],
    inputs: tuple[str, Mapping[str, Tensor]],
    seed: int,
    *,
    feeds_of_second: Mapping[str, str] | None = None,
    end: float = math.inf,
) -> Iterator[FileDifference]:
    """Yield each value that differs, under its name in the first graph, in the order of ``values``.

    Args:
        files: the reference and the candidate; other files are written beside them.
        values: the name of each in both.
        inputs: the name of the trial, and the inputs by their names in the first graph.
        seed: of the noise.
        feeds_of_second: the first graph's name of each input of the second, if they differ.
        end: when no further run is begun, by ``time.perf_counter``.
    """
    pending = [values[start : start + VALUES_A_RUN] for start in range(0, len(values), VALUES_A_RUN)]
    while pending and time.perf_counter() < end:
        few = dict(pending.pop(0))
        try:
            first, second = with_outputs(files[0], few), with_outputs(files[1], dict.fromkeys(few.values()))
            found = compare_graphs(first, second, inputs, seed, feeds=feeds_of_second, outputs=few)
        except TargetError:
            if len(few) > 1:  # one of them is no tensor, or of a type that cannot be an output
                pending[:0] = [[each] for each in few.items()]
            continue
        yield from (found[name] for name in few if found[name].differs and not found[name].is_unstable)


def compare_graphs(
    first: OnnxFile,
    second: OnnxFile,
    inputs: tuple[str, Mapping[str, Tensor]],
    seed: int,
    *,
    feeds: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
) -> dict[str, FileDifference]:
    """Return the difference of each output of two graphs on some inputs, onnxruntime's optimiser off.

    Raises:
        TargetError: one of them does not run.
    """
    candidate = FileProgram(str(second.path), session(second, optimised=False), feeds, outputs)
    comparison = Comparison(candidate)
    comparison.add(file_trials(first, [inputs], seed))
    for error in comparison.raised.values():
        raise TargetError("GC602", f"{second.path} does not run.") from error
    return {name: each for (_, name), each in comparison.worst.items()}


def with_outputs(file: OnnxFile, names: Iterable[str]) -> OnnxFile:
    """Return a file beside this one whose outputs are these values."""
    return store(select_outputs(file.model, list(names)), file.path.with_name(f"values-of-{file.path.name}"))
