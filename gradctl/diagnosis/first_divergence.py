"""The first value of two files that differs by more than rounding, and the node of each that computes it.

Values are those that the files share by their structure, in the order of the first; both run with onnxruntime's
optimiser off, some values at a time. A difference that only the optimiser makes has no such value.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from gradctl.comparison.difference import FileDifference
from gradctl.comparison.divergence import differing_values
from gradctl.comparison.trials import FileTrial
from gradctl.graphdiff.graph_difference import SharedValue
from gradctl.onnxio.onnx_file import OnnxFile
from gradctl.onnxio.submodel import copy_of

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class FirstDivergence:
    """A value, and how far it is off."""

    value: SharedValue
    difference: FileDifference


@dataclass(frozen=True, slots=True, eq=False)
class SharedValues:
    """Two files, and the values that both have.

    Attributes:
        a, b: the reference and the candidate.
        values: in the order of ``a``.
        feeds_of_b: the input of ``a`` for each input of ``b``.
        seed: of the noise.
    """

    a: OnnxFile
    b: OnnxFile
    values: Sequence[SharedValue]
    feeds_of_b: Mapping[str, str]
    seed: int

    def first_divergence(self, trial: FileTrial) -> FirstDivergence | None:
        """Return the first inner value that differs; None if only outputs do, or none was found in 30 seconds."""
        structural = None
        with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            try:
                files = _whole(self.a, Path(folder) / "a.onnx"), _whole(self.b, Path(folder) / "b.onnx")
            except ValueError:  # protobuf: with its weights a model has more than 2 GiB
                return None
            for found in self._differing(files, trial):
                # An inner value may have another type or layout and be right: one with other numbers comes first.
                if not found.difference.structure:
                    return found
                structural = structural or found
        return structural

    def _differing(self, files: tuple[OnnxFile, OnnxFile], trial: FileTrial) -> Iterator[FirstDivergence]:
        by_name = {each.before: each for each in self._inner()}
        names = [(each.before, each.after) for each in by_name.values()]
        end = time.perf_counter() + _SECONDS
        inputs = trial.name, trial.feeds
        for found in differing_values(files, names, inputs, self.seed, feeds_of_second=self.feeds_of_b, end=end):
            yield FirstDivergence(by_name[found.name], found)

    def _inner(self) -> list[SharedValue]:
        """Return the values that are no outputs of a graph, which the report has rows for."""
        first, second = ({each.name for each in file.model.graph.output} for file in (self.a, self.b))
        return [each for each in self.values if each.before not in first and each.after not in second]


def _whole(file: OnnxFile, path: Path) -> OnnxFile:
    """Return a file with its external data in it, to be written at ``path``."""
    copy = copy_of(file.model)
    onnx.external_data_helper.load_external_data_for_model(copy, str(file.path.parent))
    if copy.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError("larger than 2 GiB")
    return OnnxFile(path, copy)
