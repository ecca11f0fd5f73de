"""The values that a run starts from: parameters, buffers, inputs, and other tensors that the model holds, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gradctl.comparison.difference import dtype_name
from gradctl.core.errors import TargetError, listed, nearest
from gradctl.core.names import buffer_name, input_name, parameter_name
from gradctl.snapshots.snapshot_file import SnapshotFile, Value
from gradctl.snapshots.tensor_records import digest
from gradctl.snapshots.values_file import read_values
from gradctl.subject.aliasing import storage_key
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.reach import path_name, walk
from gradctl.subject.signature import module_of, parameters_of
from gradctl.subject.subject import Subject

_FEW = 3  # names of each kind that a message lists


def copy_subject(subject: Subject) -> Subject:
    """Return a private copy, gradient hooks and all, whose tensors may be written to."""
    return Instance(subject, keep_hooks=True).as_subject()


def named_values(subject: Subject, shared_with: Subject | None = None) -> dict[str, Tensor]:
    """Return the tensors of a subject by name, each memory once.

    Args:
        subject: the model and its inputs.
        shared_with: what it was copied from: a tensor that both hold is left out, because it is the user's own.
    """
    known = {id(tensor) for _, tensor in _held(shared_with)} if shared_with is not None else set()
    named: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in _held(subject):
        key = storage_key(tensor)
        if id(tensor) not in known and key not in seen:
            seen.add(key)
            named[name if name not in named else f"{name}~{len(named)}"] = tensor
    return named


def described(values: Mapping[str, Tensor]) -> tuple[Value, ...]:
    """Return a line of a snapshot for each value."""
    return tuple(
        Value(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), digest=digest(tensor))
        for name, tensor in values.items()
    )


def ensure_same_names(stored: Mapping[str, Value], found: Mapping[str, Value], snapshot: str, target: str) -> None:
    """Raise unless names, shapes and dtypes are those of the snapshot.

    Raises:
        TargetError: GC134 with what is missing, unknown, and of another type.
    """
    missing = [name for name in stored if name not in found]
    kinds = {
        "missing": missing,
        "unknown": [f"{name}{nearest(name, missing)}" for name in found if name not in stored],
        "of another type": [
            f"{name} ({_type(found[name])}, not {_type(value)})"
            for name, value in stored.items()
            if name in found and _type(found[name]) != _type(value)
        ],
    }
    if any(kinds.values()):
        said = "; ".join(f"{kind}: {listed(names, _FEW)}" for kind, names in kinds.items() if names)
        raise TargetError(
            "GC134",
            f"{target} is not the model of {snapshot}: its parameters, buffers and inputs are others ({said}). Name "
            "the TARGET that the snapshot was taken of, or take it again with gradctl snapshot.",
        )


def write_values(values: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Write the stored values into the tensors of the same names, in place."""
    with torch.no_grad():
        for name, tensor in values.items():
            if name in stored:
                target, source = _without_repeats(tensor, stored[name])
                target.copy_(source)


def stored_inputs(path: Path, snapshot: SnapshotFile) -> dict[str, Tensor]:
    """Return the inputs of a snapshot by the name of the parameter that takes them.

    Raises:
        TargetError: GC133 as ``read_values``; GC135 if the snapshot has no values of an input, or an input is not one
            tensor, because its structure is not stored.
    """
    prefix = input_name("")
    names = [value.name.removeprefix(prefix) for value in snapshot.values if value.name.startswith(prefix)]
    values = read_values(path, snapshot)
    if unusable := [name for name in names if prefix + name not in values or not name.isidentifier()]:
        said = f"{path} does not hold the input {listed(unusable, _FEW)} as the model takes it"
        raise TargetError("GC135", f"{said}. Pass the inputs of the model.")
    return {name: values[prefix + name] for name in names}


def _held(subject: Subject) -> list[tuple[str, Tensor]]:
    module = module_of(subject.model)
    held: list[tuple[str, Tensor]] = [
        (parameter_name(name), tensor) for name, tensor in parameters_of(subject.model).items()
    ]
    held += [(buffer_name(name), tensor) for name, tensor in (module.named_buffers() if module is not None else ())]
    given = input_names(subject.model, subject.args, subject.kwargs)
    closed = [(("inputs", name), value) for name, value in given if not isinstance(value, Tensor)]
    known = {id(tensor) for _, tensor in held}
    for path, found in walk([((), subject.model), (("loss",), subject.loss), *closed]):
        is_gradient = path[-1:] == ("grad",)
        if isinstance(found, Tensor) and id(found) not in known and not is_gradient:
            held.append((f"held:{path_name(path)}", found))
    held += [(input_name(name), value) for name, value in given if isinstance(value, Tensor)]
    return held


def _type(value: Value) -> str:
    return f"{value.dtype}{list(value.shape)}"


def _without_repeats(tensor: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return both without the repeats of expanded axes of the first, which cannot be written to."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor, source = tensor.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
    return tensor, source
