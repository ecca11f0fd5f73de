"""What differs between a snapshot and a run: a change for each tensor, in the precision in which it is larger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from gradctl.comparison.difference import Key, dtype_name
from gradctl.core.names import TensorVerdict
from gradctl.numerics.repetition import is_cancelled
from gradctl.snapshots.snapshot_file import Header, Precision, Recorded, SnapshotFile, TensorRecord
from gradctl.snapshots.snapshot_runs import Run, norm_of_difference, tolerance
from gradctl.snapshots.tensor_records import digest, distance, is_exact, record_tensors
from gradctl.snapshots.values_file import full_name

# A tensor jumps if its noise in float64 exceeds this part of the largest norm of its quantity,
_JUMP = 1e-6
# and this part of its noise in the native dtype: of rounding, the two are to each other as the machine epsilons.
_JUMP_OF_NATIVE = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class TensorChange:
    """One tensor of a snapshot beside that of a run.

    Attributes:
        key: quantity and name.
        precision: in which it differs more.
        stored, now: the records; None if the tensor is missing.
        difference, limit: norms: of the difference, and the largest that rounding explains.
        scale: norm to which both are relative.
        is_cancelled: whether the tensor is zero by cancellation.
        decided: norm; a larger difference, up to ``limit``, can be a step of the model or a change of it.
        tensor: of the run; None if it is missing.
        stored_tensor: of a snapshot with all tensors.
    """

    key: Key
    precision: Precision
    stored: TensorRecord | None
    now: TensorRecord | None
    difference: float = 0.0
    limit: float = 0.0
    scale: float = 0.0
    is_cancelled: bool = False
    decided: float = math.inf
    tensor: Tensor | None = None
    stored_tensor: Tensor | None = None

    @property
    def is_missing(self) -> bool:
        """Whether the tensor exists in one of the two only."""
        return (self.stored is None) != (self.now is None)

    @property
    def differs(self) -> bool:
        """Whether the difference is more than rounding explains."""
        return self.is_missing or self.difference > self.limit

    @property
    def is_undecided(self) -> bool:
        """Whether the difference may be a step of the model: one ULP of its inputs changes the tensor as much."""
        return not self.differs and self.difference > self.decided

    @property
    def severity(self) -> float:
        """The difference in tolerances, by which the worst is chosen."""
        if self.is_missing:
            return math.inf
        return self.difference / self.limit if self.limit else (math.inf if self.difference else 0.0)

    @property
    def verdict(self) -> TensorVerdict:
        """The verdict of the row."""
        if self.is_missing:
            return "missing"
        if self.stored is None:
            return "no-gradient"
        if self.is_undecided:
            return "unresolved"
        return "differs" if self.differs else "too-small" if self.is_cancelled else "same"

    @property
    def error(self) -> float:
        """The difference relative to the scale."""
        return self.difference / self.scale if self.scale else (math.inf if self.difference else 0.0)

    @property
    def budget(self) -> float:
        """The tolerance relative to the scale."""
        return self.limit / self.scale if self.scale else 0.0


def compare_runs(
    snapshot: SnapshotFile, runs: Mapping[Precision, Run], full: Mapping[str, Tensor]
) -> list[TensorChange]:
    """Return the worse change of each tensor of the snapshot and of the runs, in their order; no change, too.

    Args:
        snapshot: the content of its text.
        runs: on its values, by precision.
        full: all tensors that it recorded, by their names in the values file; empty if it has records only.
    """
    limits = Limits(snapshot.tensors, snapshot.header)
    worst: dict[Key, TensorChange] = {}
    for precision, run in runs.items():
        for change in _changes_of(snapshot.tensors, precision, run, full):
            if change.stored is not None and change.now is not None:
                scale, limit = limits.of(change.key, precision, change.stored.noise)
                rounding = limits.decided(change.key)
                is_small = change.key in limits.cancelled and math.isinf(rounding)
                decided = rounding if precision == "float64" else math.inf
                change = replace(change, scale=scale, limit=limit, is_cancelled=is_small, decided=decided)  # noqa: PLW2901
            known = worst.get(change.key)
            if known is None or _rank(change) > _rank(known):
                worst[change.key] = change
    return list(worst.values())


def compare_elsewhere(snapshot: SnapshotFile, run: Run) -> list[TensorChange]:
    """Return the change of each tensor where a model ran on another device or in another dtype.

    The oracle is the float64 of the snapshot, if it has any; the tolerance is that of the run, with its own noise.
    """
    precision: Precision = "native" if snapshot.header.float64_error is not None else "float64"
    limits = Limits(snapshot.tensors, snapshot.header)
    records = {(each.quantity, each.name): _of(each, precision) for each in snapshot.tensors}
    wide = {
        key: tensor if tensor is None else _converted(tensor, records.get(key)) for key, tensor in run.tensors.items()
    }
    found = []
    for change in _changes_of(snapshot.tensors, precision, replace(run, tensors=wide), {}):
        tensor = run.tensors.get(change.key)
        if change.stored is None or change.now is None or tensor is None:
            found.append(change)
            continue
        noise = run.noise.get(change.key, 0.0)
        scale, limit = limits.of(change.key, precision, noise, dtype_name(tensor.dtype))
        if is_exact(change.stored.dtype) and noise:
            limit = math.inf  # one ULP changes these integers: any are right
        now = msgspec.structs.replace(change.now, dtype=dtype_name(tensor.dtype))
        is_small = change.key in limits.cancelled
        found.append(replace(change, precision="native", now=now, scale=scale, limit=limit, is_cancelled=is_small))
    return found


class Limits:
    """The tolerances of the tensors of a snapshot.

    Attributes:
        cancelled: the tensors that are zero by cancellation, by their noise in float64, if there is a float64 run.
    """

    def __init__(self, tensors: Sequence[Recorded], header: Header) -> None:
        self._tensors = {(each.quantity, each.name): each for each in tensors}
        self._has_islands = bool(header.islands)
        self.cancelled = frozenset(key for key, each in self._tensors.items() if _is_cancelled(each))

    def decided(self, key: Key) -> float:
        """Return the norm up to which a difference in float64 is rounding, whatever the noise is.

        It is infinite for all tensors but those that jump: at a kink (the ReLU of an exact zero) or a tie, one ULP of
        the inputs changes them by far more than rounding does, and by as much in the native dtype.
        """
        tensor = self._tensors[key]
        record, native = tensor.float64, tensor.native
        if self._has_islands or record is None or native is None or not record.noise:
            return math.inf
        if is_exact(record.dtype):
            return 0.0
        scale = self._largest(key, "float64")
        is_rounding = native.dtype != record.dtype and record.noise < _JUMP_OF_NATIVE * native.noise
        if is_rounding or record.noise <= _JUMP * scale:
            return math.inf
        return tolerance(scale, 0.0, getattr(torch, record.dtype))

    def of(self, key: Key, precision: Precision, noise: float, dtype: str | None = None) -> tuple[float, float]:
        """Return the scale of a tensor, and the largest norm of its difference.

        Args:
            key: quantity and name.
            precision: of the record that it is compared with.
            noise: of one ULP.
            dtype: of the run; None for that of the record.
        """
        tensor = self._tensors[key]
        record = _of(tensor, precision)
        assert record is not None
        scale = record.norm
        if key in self.cancelled:
            scale = self._largest(key, precision)
        if dtype is None:
            # Operators that ran in the native dtype inside a float64 run round as there.
            is_mixed = precision == "float64" and self._has_islands and tensor.native is not None
            dtype = tensor.native.dtype if is_mixed and tensor.native is not None else record.dtype
        return scale, tolerance(scale, noise, getattr(torch, dtype))

    def _largest(self, key: Key, precision: Precision) -> float:
        """Return the largest norm of the tensors of the same quantity."""
        records = (_of(each, precision) for each in self._tensors.values() if each.quantity == key[0])
        return max(each.norm for each in records if each is not None)


def _rank(change: TensorChange) -> tuple[bool, bool, float]:
    return change.differs, change.is_undecided, change.severity


def _changes_of(
    tensors: Sequence[Recorded], precision: Precision, run: Run, full: Mapping[str, Tensor]
) -> Iterator[TensorChange]:
    """Yield the change of each tensor in one precision, without its tolerance."""
    stored = {(each.quantity, each.name): _of(each, precision) for each in tensors}
    present = {key: tensor for key, tensor in run.tensors.items() if tensor is not None}
    other = {key: tensor for key, tensor in present.items() if not _is_same(stored.get(key), tensor)}
    noise = {key: record.noise if (record := stored.get(key)) is not None else 0.0 for key in other}
    records = record_tensors(other, noise)
    for key in dict.fromkeys([*stored, *present]):
        before, tensor = stored.get(key), present.get(key)
        now = None if tensor is None else records.get(key, before)
        kept = full.get(full_name(precision, key))
        difference = 0.0
        if before is not None and now is not None and now is not before:
            is_alike = before.dtype == now.dtype and before.nonfinite == now.nonfinite
            is_measured = (
                kept is not None
                and tensor is not None
                and is_alike
                and not (is_exact(before.dtype) and not before.noise)
            )
            difference = distance(before, now) if before.dtype == now.dtype else math.inf
            if is_measured and kept is not None and tensor is not None:
                difference = norm_of_difference(kept, tensor)
        yield TensorChange(key, precision, before, now, difference, tensor=tensor, stored_tensor=kept)


def _is_same(stored: TensorRecord | None, tensor: Tensor) -> bool:
    """Return whether a tensor has the shape, dtype and bits of a record."""
    alike = stored is not None and (stored.shape, stored.dtype) == (tuple(tensor.shape), dtype_name(tensor.dtype))
    return alike and stored is not None and stored.digest == digest(tensor)


def _of(tensor: Recorded, precision: Precision) -> TensorRecord | None:
    return tensor.float64 if precision == "float64" else tensor.native


def _is_cancelled(each: Recorded) -> bool:
    record = each.float64 or each.native
    if record is None or is_exact(record.dtype):
        return False
    return is_cancelled(record.norm, record.noise, getattr(torch, record.dtype))


def _converted(tensor: Tensor, record: TensorRecord | None) -> Tensor:
    """Return a float tensor in the dtype of a record, any other as it is."""
    if record is None or is_exact(record.dtype) or is_exact(dtype_name(tensor.dtype)):
        return tensor
    dtype: torch.dtype = getattr(torch, record.dtype)
    return tensor.to(dtype) if tensor.is_complex() == dtype.is_complex else tensor
