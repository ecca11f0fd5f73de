"""``--weights``: a state dict from a file into the model, by name, or the names that do not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import TargetError, listed, nearest
from gradctl.core.target_files import WEIGHT_SUFFIXES
from gradctl.subject.aliasing import storage_key
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.tensor_file import read_tensors
from gradctl.subject.signature import module_of

_FEW = 3  # names of each kind that a message lists
_NESTED = ("state_dict", "model_state_dict", "model")  # where training loops keep it in a checkpoint
_OPTIONAL = "num_batches_tracked"  # absent before torch 0.4.1, and no module asks for it
_COMPILED = "_orig_mod."  # torch.compile's wrapper
_PARALLEL = "module."  # DataParallel's and DistributedDataParallel's


def load_weights(model: Callable[..., Any], path: Path, target: str) -> None:
    """Load the state dict of ``path`` into the model, in place.

    Names are compared without ``_orig_mod.``, and without ``module.`` where all names of one side have it. Of tied
    parameters one name is enough.

    Raises:
        TargetError: GC121 if names or shapes do not fit, or the model has none; GC122 if the file cannot be read or
            holds no state dict.
        TrustError: GC901 if it holds pickled code.
    """
    owner = module_of(model)
    if owner is None:
        raise TargetError("GC121", f"{target} is a function, which has no weights. Leave out --weights.")
    remedy = f"Save a state dict: torch.save(model.state_dict(), {path.name!r})."
    found = _state_dict(path, read_tensors(path, WEIGHT_SUFFIXES, remedy))
    own = owner.state_dict(keep_vars=True)
    full_names = dict(zip(_plain_names(own), own, strict=True))
    expected = {name: own[full] for name, full in full_names.items()}
    given = dict(zip(_plain_names(found), found.values(), strict=True))
    tied = _tied(expected)
    _add_tied(given, tied)
    prepared = OrderedDict((full_names.get(name, name), value) for name, value in given.items())
    if list(prepared) == list(found):
        prepared._metadata = getattr(found, "_metadata", None)  # type: ignore[attr-defined]  # versions of modules
    absent, unknown, refusal = _load(owner, prepared)
    missing = [name for name, full in full_names.items() if full in absent]
    problems: dict[str, list[str]] = {
        "missing": missing,
        "unknown": [f"{name}{nearest(name, missing)}" for name in unknown],
        "of another shape": list(_reshaped(expected, given)),
        "one tensor in the model and two in the file": list(_torn(tied, given)),
    }
    if count := sum(map(len, problems.values())):
        kinds = "; ".join(f"{kind} {listed(names, _FEW)}" for kind, names in problems.items() if names)
        refusal = f"{count} of {len(expected.keys() | given.keys())} names do not fit the model: {kinds}"
    if refusal:
        raise TargetError("GC121", f"{path}: {refusal}. Rename them in the file, or load it in your factory.")


def _load(owner: nn.Module, prepared: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str], str]:
    """Load a state dict; return the names that it lacks, those that the model does not have, and why that failed."""
    try:
        outcome = owner.load_state_dict(prepared, strict=False)
    except Exception as error:  # a wrong shape, or a hook of the user's
        own = owner.state_dict()
        missing = [name for name in own if name not in prepared and not name.endswith(_OPTIONAL)]
        unknown = [name for name in prepared if name not in own]
        return missing, unknown, f"the model refuses them: {first_line(error)}"
    return outcome.missing_keys, outcome.unexpected_keys, ""


def _add_tied(given: dict[str, Any], tied: Iterable[Sequence[str]]) -> None:
    """Add the other names of tied parameters that have one name in the file."""
    for names in tied:
        present = next((name for name in names if name in given), None)
        if present is not None:
            given.update((name, given[present]) for name in names if name not in given)


def _reshaped(expected: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names whose tensor has another shape in the model, with both shapes."""
    for name, value in given.items():
        wanted = expected.get(name)
        if isinstance(wanted, Tensor) and isinstance(value, Tensor) and wanted.shape != value.shape:
            yield f"{name} ({list(value.shape)}, not {list(wanted.shape)})"


def _torn(tied: Iterable[Sequence[str]], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of tied parameters whose tensors in the file differ."""
    for names in tied:
        first, *others = (name for name in names if isinstance(given.get(name), Tensor))
        for other in others:
            kept, lost = given[first], given[other].to(given[first].dtype)
            if kept.shape == lost.shape and not torch.equal(kept, lost):
                yield f"{first} and {other}"


def _tied(tensors: Mapping[str, Any]) -> list[list[str]]:
    """Return the groups of names that are one tensor: one object, or the same memory seen the same way."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            groups.setdefault(storage_key(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _state_dict(path: Path, content: Any) -> Mapping[str, Any]:
    """Return the state dict in a file's content, which may be a checkpoint that has more in it."""
    if isinstance(content, Mapping):
        nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
        if (
            nested
            and any(isinstance(value, Tensor) for value in nested.values())
            and all(isinstance(key, str) for key in nested)
        ):
            return nested
        keys = f" with {', '.join(map(str, list(content)[:_FEW]))}" if content else " with nothing in it"
        what = f"a dict{keys}"
    else:
        what = f"an object of type {type(content).__name__!r}"
    raise TargetError("GC122", f"{path} holds {what}, and no state dict. Save model.state_dict().")


def _plain_names(names: Iterable[str]) -> list[str]:
    """Return the names without the wrappers of ``torch.compile`` and of data-parallel training."""
    plain = [name.replace(_COMPILED, "") for name in names]
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    return plain
