"""What findings have in common: one cause is one message, with the tensors that it affects."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from gradctl.core.findings import Finding, TensorResult, Unit
from gradctl.core.names import Quantity
from gradctl.report.text.wording import FUNCTION_CODES, RIGHT, counted_as_judged, first_names, worst_first

# Findings whose code states the cause: another way to train, in which the gradient differs.
_REGIMES = ("GC416", "GC417")
_FEW = 3  # options that one line lists


def affected_tensors(unit: Unit) -> set[str]:
    """Return the names of the tensors that are wrong only because of a Function, or an output that is NaN."""
    causes = (*FUNCTION_CODES, "GC407")
    return {finding.tensor for finding in unit.findings if finding.cause in causes and finding.tensor is not None}


@dataclass(frozen=True, slots=True)
class SharedCause:
    """What several findings have in common.

    Attributes:
        stated: the cause, as a finding; several if several causes affect the same tensors.
        findings: those that it stands for.
        tensors: their tensors, worst first.
    """

    stated: list[Finding]
    findings: list[Finding]
    tensors: list[TensorResult]


def shared_causes(findings: Sequence[Finding], tensors: Sequence[TensorResult]) -> list[SharedCause]:
    """Return causes that affect several of the tensors.

    Findings have one cause if its text agrees; of a cause without a text, if code, line and message agree but for names
    and numbers. A finding that states only that a tensor is wrong has none.
    """
    causes: dict[frozenset[str | None], list[list[Finding]]] = {}
    for group in _groups_by_cause(findings, {tensor.tensor for tensor in tensors}):
        if len(affected := frozenset(each.tensor for each in group)) > 1:
            causes.setdefault(affected, []).append(group)
    return [
        SharedCause(
            [_stated(group) for group in groups],
            [each for group in groups for each in group],
            [tensor for tensor in tensors if tensor.tensor in affected],
        )
        for affected, groups in causes.items()
    ]


def _groups_by_cause(findings: Sequence[Finding], names: Container[str | None]) -> Iterable[list[Finding]]:
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for each in findings:
        key = _cause_key(each)
        if key is not None and each.tensor in names and each.severity != "note" and not each.allowed:
            groups.setdefault(key, []).append(each)
    return groups.values()


def _cause_key(finding: Finding) -> tuple[object, ...] | None:
    if finding.cause_message:
        return finding.cause, finding.cause_message
    place = finding.location
    line = (place.file, place.line) if place is not None and place.file else None
    if finding.tensor is None or not (finding.cause or line or finding.code in _REGIMES):
        return None
    return (
        finding.code,
        finding.cause,
        line,
        re.sub(r"\d[\d.]*(e[-+]\d+)?", "", finding.message.replace(finding.tensor, "")),
    )


def _stated(group: Sequence[Finding]) -> Finding:
    """Return the first finding of a group, or its cause if that has a text, with the options that accept them all."""
    allows = list(dict.fromkeys(each.allow for each in group if each.allow))
    # Not the code alone: that would accept what other causes do as well.
    allow = f"{allows[0]} (and {len(allows) - 1} more)" if len(allows) > _FEW else " --allow ".join(allows)
    first = msgspec.structs.replace(group[0], allow=allow)
    if first.cause is None or not first.cause_message:
        return first
    return msgspec.structs.replace(first, code=first.cause, cause=None, message=first.cause_message)


def findings_by_cause(unit: Unit) -> list[Finding]:
    """Return the findings of a unit worst first, those that share a cause as one that names their tensors."""
    found = list(unit.findings)
    for shared in shared_causes(unit.findings, unit.tensors):
        names = first_names([tensor.tensor for tensor in shared.tensors])
        found = [each for each in found if each not in shared.findings]
        found += [
            msgspec.structs.replace(each, message=f"{each.message} This affects {names}.") for each in shared.stated
        ]
    return worst_first(found)


def affected_line(unit: Unit, affected: Sequence[TensorResult], *, causes: int = 1) -> str:
    """Return how many tensors of each quantity some causes affect, and how."""
    quantities: tuple[Quantity, ...] = ("gradient", "output", "buffer")
    numbers = Counter(tensor.quantity for tensor in affected)
    counts = [f"{numbers[each]} of {counted_as_judged(unit, each)}" for each in quantities if numbers[each]]
    words = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
    verdicts = {tensor.verdict for tensor in affected}
    if unit.form != "eager" and verdicts == {RIGHT}:
        return f"for this reason {words} differ from {'the reference' if unit.reference else 'eager'}, which is wrong:"
    if verdicts == {"less-accurate"}:
        return f"this applies to {words}:"
    return f"{'this makes' if causes < 2 else 'these make'} {words} wrong:"
