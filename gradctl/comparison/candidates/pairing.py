"""Which parameter of a candidate is which of the reference: by name, by a map of names, else by order and shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.core.errors import TargetError, listed, nearest

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pairing:
    """The names of the tensors of two models.

    Attributes:
        partners: the reference's name of each tensor of the candidate that has a partner.
        by_order: those of them, by the candidate's names, that have another name and were paired by order and shape.
        unpaired_reference, unpaired_candidate: the parameters without a partner.
    """

    partners: dict[str, str]
    by_order: tuple[str, ...]
    unpaired_reference: tuple[str, ...]
    unpaired_candidate: tuple[str, ...]


def parse_map(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of ``OLD=NEW``; a ``*`` in OLD stands for any text, and is put in the place of the one in NEW.

    Raises:
        ValueError: a text is not ``OLD=NEW``, or the two have not as many ``*``.
    """
    pairs = []
    for text in texts:
        old, equals, new = text.partition("=")
        if not (equals and old and new):
            raise ValueError(f"{text!r} is not OLD=NEW, for example 'attention.*=attn.*'.")
        if old.count("*") != new.count("*"):
            raise ValueError(f"{text!r} has {old.count('*')} '*' before the '=' and {new.count('*')} after it.")
        pairs.append((old, new))
    return pairs


def pair_tensors(
    reference: tuple[Tensors, Tensors], candidate: tuple[Tensors, Tensors], renamed: Sequence[tuple[str, str]] = ()
) -> Pairing:
    """Return which tensor of the candidate is which of the reference.

    First the names of ``renamed`` (``OLD``, ``NEW``; see ``parse_map``), then equal names, then order and shape: of
    the parameters that are left, those of each shape are paired in their order if both models have as many of them.
    Buffers are paired by name only; those of one name and two shapes are not (a cache).

    Args:
        reference, candidate: parameters and buffers by name.
        renamed: names of the reference, and of the candidate.

    Raises:
        TargetError: GC124 if a pair by name has two shapes, or a name of ``renamed`` exists in neither model.
    """
    tensors, own_tensors = ({**parameters, **buffers} for parameters, buffers in (reference, candidate))
    partners = dict(_renamed(tensors, own_tensors, renamed))
    partners |= _of_one_name(tensors, own_tensors, partners, reference[0])
    _ensure_shapes(tensors, own_tensors, partners)
    taken = set(partners.values())
    left, own_left = [n for n in reference[0] if n not in taken], [n for n in candidate[0] if n not in partners]
    ordered = dict(_by_order(tensors, own_tensors, left, own_left))
    partners |= ordered
    # A tied tensor has several names, of which one partner is enough.
    paired = {id(tensors[name]) for name in partners.values()}
    own_paired = {id(own_tensors[name]) for name in partners}
    return Pairing(
        partners,
        tuple(ordered),
        tuple(name for name in left if id(tensors[name]) not in paired),
        tuple(name for name in own_left if id(own_tensors[name]) not in own_paired),
    )


def _of_one_name(
    reference: Tensors, candidate: Tensors, partners: Mapping[str, str], parameters: Collection[str]
) -> dict[str, str]:
    """Return the names that both models have and no map names; buffers only if their shapes agree."""
    names = candidate.keys() & reference.keys() - set(partners.values()) - partners.keys()
    return {each: each for each in names if each in parameters or candidate[each].shape == reference[each].shape}


def _ensure_shapes(reference: Tensors, candidate: Tensors, partners: Mapping[str, str]) -> None:
    for own, name in partners.items():
        if candidate[own].shape != reference[name].shape:
            shapes = f"{list(candidate[own].shape)}, and {name!r} of the reference has {list(reference[name].shape)}"
            raise TargetError("GC124", f"{own!r} of the candidate has the shape {shapes}. Name its partner with --map.")


def _renamed(reference: Tensors, candidate: Tensors, renamed: Sequence[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Yield the pairs of candidate and reference that a map names."""
    partners: dict[str, str] = {}
    for old, new in renamed:
        pattern = re.compile("(.*)".join(map(re.escape, old.split("*"))))
        found = [(name, match) for name in reference if (match := pattern.fullmatch(name))]
        if not found:
            near = nearest(old, reference)
            raise TargetError("GC124", f"--map {old}={new}: the reference has no parameter {old!r}{near}.")
        for name, match in found:
            texts = iter(match.groups())
            own = "".join(next(texts) if each == "*" else each for each in new)
            if own not in candidate:
                near = nearest(own, candidate)
                raise TargetError("GC124", f"--map {old}={new}: the candidate has no parameter {own!r}{near}.")
            other = partners.setdefault(own, name)
            if reference[other] is not reference[name]:
                said = f"{own!r} of the candidate is the partner of both {other!r} and {name!r}"
                raise TargetError("GC124", f"--map {old}={new}: {said}; give it one.")
            yield own, name


def _by_order(
    reference: Tensors, candidate: Tensors, left: Sequence[str], own_left: Sequence[str]
) -> Iterable[tuple[str, str]]:
    counts, own_counts = (
        Counter(tensors[name].shape for name in names) for tensors, names in ((reference, left), (candidate, own_left))
    )
    for shape, count in counts.items():
        if own_counts[shape] == count:
            same = [name for name in left if reference[name].shape == shape]
            yield from zip([name for name in own_left if candidate[name].shape == shape], same, strict=True)


def copy_values(reference: Tensors, candidate: Tensors, partners: Mapping[str, str]) -> None:
    """Write the values of the reference to the candidate's tensors.

    Raises:
        TargetError: GC124 if one tensor of the candidate would have the values of several.
    """
    with torch.no_grad():
        for own, name in partners.items():
            candidate[own].copy_(reference[name])
    for own, name in partners.items():
        if not torch.equal(candidate[own], reference[name].to(candidate[own])):
            memory = candidate[own].data_ptr()
            others = [each for each in partners if each != own and candidate[each].data_ptr() == memory]
            raise TargetError(
                "GC124",
                f"{own!r} shares its memory with {listed(others)} in the candidate; the reference has different values "
                f"for them. Untie them, or give the candidate its own values with --own-weights.",
            )
