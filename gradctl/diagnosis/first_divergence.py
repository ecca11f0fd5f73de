"""The first value of two files that differs by more than rounding: which node of each makes it.

Values are those that the files share by their structure, in the order of the first; both run with onnxruntime's
optimiser off, some values at a time. What only the optimiser makes differ has no such value.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from gradctl.comparison.file_outputs import OutputRow
from gradctl.diagnosis.inner_values import differing_values
from gradctl.graphdiff.graph_difference import SharedValue
from gradctl.onnxio.onnx_file import OnnxFile

__all__ = ["FirstDivergence", "SharedValues"]

_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class FirstDivergence:
    """A value, and how far it is off."""

    value: SharedValue
    row: OutputRow


@dataclass(frozen=True, slots=True, eq=False)
class SharedValues:
    """Two files, and the values that both have.

    Attributes:
        a: what is right.
        b: what is judged.
        values: in the order of ``a``.
        feeds_of_b: the input of ``a`` for one of ``b``.
        seed: of the noise.
    """

    a: OnnxFile
    b: OnnxFile
    values: Sequence[SharedValue]
    feeds_of_b: Mapping[str, str]
    seed: int

    def first_divergence(self, trial: str, feeds: Mapping[str, Tensor]) -> FirstDivergence | None:
        """Return the first inner value that differs; None where only outputs do, or none was found in 30 seconds.

        Args:
            trial: what the inputs are called.
            feeds: the inputs, by the names of ``a``.
        """
        structural = None
        with tempfile.TemporaryDirectory(prefix="gradctl-") as folder:
            try:
                files = _whole(self.a, Path(folder) / "a.onnx"), _whole(self.b, Path(folder) / "b.onnx")
            except ValueError:  # protobuf: with its weights a model has more than 2 GiB
                return None
            for found in self._differing(*files, trial, feeds):
                # An inner value may be kept in another type or layout and be right about it: numbers tell first.
                if not found.row.structure:
                    return found
                structural = structural or found
        return structural

    def _differing(
        self, a: OnnxFile, b: OnnxFile, trial: str, feeds: Mapping[str, Tensor]
    ) -> Iterator[FirstDivergence]:
        feeds_of_b = {name: feeds[other] for name, other in self.feeds_of_b.items()}
        by_name = {each.before: each for each in self._inner()}
        names = [(each.before, each.after) for each in by_name.values()]
        end = time.perf_counter() + _SECONDS
        for row in differing_values((a, b), names, (feeds, feeds_of_b), trial, self.seed, end=end):
            yield FirstDivergence(by_name[row.name], row)

    def _inner(self) -> list[SharedValue]:
        """Return the values that are no outputs of a graph, which the report has rows for."""
        mine, theirs = ({each.name for each in file.model.graph.output} for file in (self.a, self.b))
        return [each for each in self.values if each.before not in mine and each.after not in theirs]


def _whole(file: OnnxFile, path: Path) -> OnnxFile:
    """Return a file with its external data in it, to be written at ``path``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(file.model)
    onnx.external_data_helper.load_external_data_for_model(copy, str(file.path.parent))
    if copy.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError("larger than 2 GiB")
    return OnnxFile(path, copy)
