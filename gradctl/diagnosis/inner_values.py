"""Inner values of two graphs beside each other: given out a few at a time, by runs with onnxruntime's optimiser off."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from gradctl.comparison.file_outputs import OutputRow, noisy_outputs, output_rows, perturbed_sessions
from gradctl.comparison.verified_graph import stored
from gradctl.core.errors import TargetError
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import run
from gradctl.onnxio.submodel import giving

__all__ = ["VALUES_A_RUN", "differing_values", "giving_values"]

VALUES_A_RUN = 32

_Feeds = Mapping[str, Tensor]


def differing_values(
    files: tuple[OnnxFile, OnnxFile],
    values: Sequence[tuple[str, str]],
    feeds: tuple[_Feeds, _Feeds],
    trial: str,
    seed: int,
    *,
    end: float = math.inf,
) -> Iterator[OutputRow]:
    """Give a row for each value that differs, under its name in the first graph, in the order of ``values``.

    Args:
        files: what is right, and what is judged; others are written beside them.
        values: the name of each in both.
        feeds: the inputs of both.
        trial: what these are called.
        seed: of the noise.
        end: when no further run is begun, by ``time.perf_counter``.
    """
    pending = [values[start : start + VALUES_A_RUN] for start in range(0, len(values), VALUES_A_RUN)]
    while pending and time.perf_counter() < end:
        few = dict(pending.pop(0))
        try:
            left, right = giving_values(files[0], few), giving_values(files[1], dict.fromkeys(few.values()))
            expected, given = (
                run(session(each, optimised=False), fed) for each, fed in zip((left, right), feeds, strict=True)
            )
            noisy = noisy_outputs(perturbed_sessions(left, seed, optimised=False), feeds[0], seed)
        except (RuntimeError, TargetError):
            if len(few) > 1:  # one of them is no tensor, or of a type that cannot be given out
                pending[:0] = [[each] for each in few.items()]
            continue
        renamed = {name: given[other] for name, other in few.items()}
        yield from (row for row in output_rows(trial, expected, renamed, noisy) if row.differs and not row.unstable)


def giving_values(file: OnnxFile, names: Iterable[str]) -> OnnxFile:
    """Return a file beside this one whose outputs are these values."""
    return stored(giving(file.model, list(names)), file.path.with_name(f"values-of-{file.path.name}"))
