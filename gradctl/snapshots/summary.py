"""What ``gradctl snapshot`` prints of a snapshot that it wrote."""

from __future__ import annotations

from collections import Counter

from gradctl.core.errors import listed
from gradctl.snapshots.take_snapshot import Snapshot

_NOUNS = {"output": "output", "gradient": "gradient", "buffer": "buffer update"}
_VALUES = {"param": "parameter", "buffer": "buffer", "input": "input", "held": "other tensor"}


def summary_lines(taken: Snapshot) -> list[str]:
    """Return what the two files hold, their sizes, and what a reader should know of the model."""
    header, tensors = taken.content.header, taken.content.tensors
    counts = Counter(_NOUNS[each.quantity] for each in tensors if each.native is not None)
    dtypes = sorted({each.native.dtype for each in tensors if each.native is not None})
    precisions = listed(list(dict.fromkeys([*(["float64"] if header.float64_error is None else []), *dtypes])))
    lines = [f"{taken.path} holds {_counted(counts)} in {precisions} ({_size(taken.text_bytes)})"]
    if header.values is not None:
        kinds = Counter(_VALUES[each.name.partition(":")[0]] for each in taken.content.values)
        every = ", and every tensor of the run" if header.values.is_full else ""
        lines.append(f"the values file beside it holds {_counted(kinds)}{every} ({_size(header.values.bytes)})")
    else:
        lines.append(f"no values are stored, only their digests: {header.without_values or 'the model has none'}")
    if missing := [each.name for each in tensors if each.native is None]:
        lines.append(f"without a gradient: {listed(missing)}")
    if header.float64_error is not None:
        lines.append(f"the model does not run in float64: {header.float64_error}")
    return [*lines, *(f"{each.severity} {each.code} {each.message}" for each in taken.notes)]


def _counted(counts: Counter[str]) -> str:
    words = [f"{count} {noun}{'s' * (count > 1)}" for noun, count in counts.items()]
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _size(count: int) -> str:
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"
