"""The words of changes: a row of the report for each tensor, and a finding for each that changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch

from gradctl.comparison.difference import Key
from gradctl.core.findings import Element, Finding, TensorResult
from gradctl.core.names import Quantity, TensorVerdict
from gradctl.core.numbers import Number, number
from gradctl.snapshots.changes import TensorChange
from gradctl.snapshots.snapshot_file import Recorded
from gradctl.snapshots.tensor_records import plain

_CODES: dict[Quantity, str] = {"output": "GC310", "gradient": "GC311", "buffer": "GC312"}
_MOST_ELEMENTS = 5


def row_of(change: TensorChange) -> TensorResult:
    """Return the row of a tensor in the report, with the elements that differ most if it changed."""
    record = change.stored or change.now
    quantity, name = change.key
    is_compared = change.stored is not None and change.now is not None
    return TensorResult(
        quantity=quantity,
        tensor=name,
        verdict=change.verdict,
        shape=record.shape if record is not None else (),
        dtype=record.dtype if record is not None else "none",
        error=number(change.error) if is_compared else None,
        budget=number(change.budget) if is_compared else None,
        worst=_elements(change) if change.differs else (),
    )


def finding_of(change: TensorChange) -> Finding:
    """Return the finding on a tensor that changed."""
    quantity, name = change.key
    stored, now = change.stored, change.now
    what = {"output": name, "buffer": f"{name} after the call", "gradient": f"the gradient of {name}"}[quantity]
    if stored is None or now is None:
        said = "is missing now" if now is None else "exists now, and not in the snapshot"
        return _finding("GC313", change.key, "missing", f"{what} {said}.")
    error: Number = None
    if stored.shape != now.shape or (stored.dtype != now.dtype and math.isinf(change.difference)):
        said = f"is {now.dtype}{list(now.shape)} now, and {stored.dtype}{list(stored.shape)} in the snapshot"
    elif stored.nonfinite != now.nonfinite:
        said = "has NaN or infinity in other elements than in the snapshot"
    elif not math.isfinite(change.difference):
        said = f"({stored.dtype}) has other elements than in the snapshot"
    else:
        error = number(change.error)
        precision = "float64" if change.precision == "float64" else now.dtype
        said = f"changed in {precision}: relative error {change.error:.2e} (tolerance {change.budget:.2e})"
    return _finding(_CODES[quantity], change.key, "differs", f"{what} {said}.", error)


def undecided_finding_of(change: TensorChange) -> Finding:
    """Return the finding on a tensor that differs, but by no more than one ULP of the inputs can change it."""
    said = (
        f"{change.key[1]} changed in float64: relative error {change.error:.2e}, but the model has a kink or a tie at "
    )
    said += "these inputs, where one unit in the last place changes it as much."
    found = _finding("GC317", change.key, "unresolved", said, number(change.error))
    hint = (
        "take the snapshot with inputs at which no ReLU, maximum or rounding has a tie (--input, --inputs), or store "
    )
    return msgspec.structs.replace(found, severity="warning", hint=f"{hint}the new results with --update.")


def changed_modes(snapshot: Sequence[Recorded], differentiable: frozenset[str]) -> list[Finding]:
    """Return a finding for each output that requires a gradient in the snapshot only, or now only."""
    found = []
    for each in snapshot:
        if each.quantity == "output" and each.requires_grad != (each.name in differentiable):
            where = "in the snapshot, and not now" if each.requires_grad else "now, and not in the snapshot"
            said = f"{each.name} requires a gradient {where}."
            found.append(_finding("GC310", ("output", each.name), "differs", said))
    return found


def _finding(code: str, key: Key, verdict: TensorVerdict, message: str, error: Number = None) -> Finding:
    return Finding(
        code=code,
        severity="error",
        quantity=key[0],
        tensor=key[1],
        verdict=verdict,
        message=message,
        error=error,
        allow=f"{code}:{key[1]}",
    )


def _elements(change: TensorChange) -> tuple[Element, ...]:
    """Return the elements that differ most, of those that the snapshot holds."""
    stored, tensor = change.stored, change.tensor
    if stored is None or tensor is None or tensor.is_complex() or tuple(tensor.shape) != stored.shape:
        return ()
    now = plain(tensor).reshape(-1)
    kept: dict[int, float] = dict(enumerate(stored.elements)) if stored.elements else dict(stored.largest)
    if change.stored_tensor is not None:
        reference = plain(change.stored_tensor).reshape(-1)
        errors = (now.to(torch.float64) - reference.to(torch.float64)).abs()
        places = errors.topk(min(_MOST_ELEMENTS, errors.numel())).indices.tolist()
        kept = {place: float(reference[place]) for place in places}
    sized = [(abs(float(now[place]) - value), place, value) for place, value in kept.items()]
    sized.sort(key=lambda each: -math.inf if math.isnan(each[0]) else -each[0])
    worst = [each for each in sized if each[0]][:_MOST_ELEMENTS]
    return tuple(_element(_index(place, stored.shape), value, float(now[place])) for _, place, value in worst)


def _element(index: tuple[int, ...], reference: float, candidate: float) -> Element:
    error = abs(candidate - reference)
    return Element(
        index=index,
        reference=number(reference),
        candidate=number(candidate),
        absolute_error=number(error),
        relative_error=number(error / abs(reference) if reference else math.inf if error else 0.0),
    )


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of an element by its number in row-major order."""
    index = []
    for size in reversed(shape):
        place, last = divmod(place, size)
        index.append(last)
    return tuple(reversed(index))
