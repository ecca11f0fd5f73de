"""A form with free sizes, held against eager at sizes one larger as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from gradctl.checks.compare import Comparing
from gradctl.core.errors import TargetError
from gradctl.core.findings import Unit
from gradctl.forms.form import Captured
from gradctl.forms.table import form_named
from gradctl.subject.dynamic import Dynamic, by_leaf
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["at_other_sizes"]


def at_other_sizes(unit: Unit, before: Comparing, captured: Captured, dynamic: Dynamic) -> Unit:
    """Return the unit with a comparison at sizes one larger; where that fails, it is the verdict.

    Args:
        unit: the verdict at the example's sizes; one that does not pass is returned as it is.
        before: what it came from.
        captured: the form, not widened.
        dynamic: the free sizes.
    """
    if not dynamic or unit.verdict != "pass":
        return unit
    sizes = dict.fromkeys(size for axes in dynamic.values() for size in axes.values())
    named = ", ".join(f"{size} + 1" for size in sizes)
    try:
        comparing = Comparing(_longer(before.subject, dynamic), before.allows, fail_on=before.fail_on)
    except TargetError as error:  # not every size is one that the model itself takes
        reason = f"not tried: {named} ({error.message.partition('. ')[0].rstrip('.')})"
        return msgspec.structs.replace(unit, reason="; ".join(part for part in (unit.reason, reason) if part))
    longer = comparing.captured(captured, form_named(captured.form))
    chosen = unit if longer.verdict == "pass" else longer
    return msgspec.structs.replace(
        chosen, variations=(*unit.variations, named), seconds=unit.seconds + longer.seconds, timing=unit.timing
    )


def _longer(subject: Subject, dynamic: Dynamic) -> Subject:
    """Return the subject with each free axis one longer, its last slice repeated."""
    args, kwargs = subject.args, subject.kwargs
    free = iter(_axes(subject, dynamic))

    def longer(_: str, leaf: object) -> object:
        axes: Mapping[int, str] = next(free)
        if not isinstance(leaf, Tensor):
            return leaf
        for axis in axes:
            leaf = torch.cat([leaf, leaf.narrow(axis, -1, 1)], axis)
        return leaf

    longer_args, longer_kwargs = map_leaves(longer, (args, kwargs))
    return replace(subject, args=longer_args, kwargs=longer_kwargs)


def _axes(subject: Subject, dynamic: Dynamic) -> list[Mapping[int, str]]:
    """Return the free axes of each leaf of the inputs, in order."""
    marked = by_leaf(subject.model, subject.args, subject.kwargs, dynamic, _Axes)
    return [leaf.axes if isinstance(leaf, _Axes) else {} for _, leaf in leaves(marked)]


class _Axes:
    """Free axes as a leaf, where a mapping would nest."""

    def __init__(self, axes: Mapping[int, str]) -> None:
        self.axes = axes
