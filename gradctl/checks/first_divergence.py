"""The first value of two files that differs by more than rounding: which node of each makes it.

Values are those that the files share by their structure, in the order of the first; both run with onnxruntime's
optimiser off, some values at a time. What only the optimiser makes differ has no such value.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from gradctl.checks.file_outputs import OutputRow, noisy_outputs, output_rows, perturbed_sessions
from gradctl.checks.verified_graph import stored
from gradctl.core.errors import TargetError
from gradctl.forms.onnx_file import OnnxFile, session
from gradctl.forms.onnx_session import run
from gradctl.passes.part import giving
from gradctl.passes.structure import SharedValue

__all__ = ["FirstDivergence", "SharedValues"]

_VALUES_A_RUN = 32
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
        values = self._inner()
        pending = [values[start : start + _VALUES_A_RUN] for start in range(0, len(values), _VALUES_A_RUN)]
        end = time.perf_counter() + _SECONDS
        while pending and time.perf_counter() < end:
            few = pending.pop(0)
            by_name = {each.before: each for each in few}
            try:
                left, right = _giving(a, by_name), _giving(b, dict.fromkeys(each.after for each in few))
                expected = run(session(left, optimised=False), feeds)
                given = run(session(right, optimised=False), feeds_of_b)
                noisy = noisy_outputs(perturbed_sessions(left, self.seed, optimised=False), feeds, self.seed)
            except (RuntimeError, TargetError):
                if len(few) > 1:  # one of them is no tensor, or of a type that cannot be given out
                    pending[:0] = [[each] for each in few]
                continue
            renamed = {name: given[each.after] for name, each in by_name.items()}
            for row in output_rows(trial, expected, renamed, noisy):
                if row.differs and not row.unstable:
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


def _giving(file: OnnxFile, names: Iterable[str]) -> OnnxFile:
    return stored(giving(file.model, list(names)), file.path.with_name(f"values-of-{file.path.name}"))
