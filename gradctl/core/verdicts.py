"""From findings to verdicts to exit codes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from gradctl.core.findings import Finding, Summary, TensorResult
from gradctl.core.names import NOT_JUDGED, SEVERITIES, UnitStatus, UnitVerdict
from gradctl.core.numbers import format_number

EXIT_CODES: dict[UnitVerdict, int] = {"pass": 0, "fail": 1, "inconclusive": 4, "skipped": 5}
_AGREES = ("same", "non-differentiable", *NOT_JUDGED)
_UNCHECKED = frozenset(NOT_JUDGED) - {"too-small"}


def unit_verdict(
    status: UnitStatus, findings: Iterable[Finding], tensors: Iterable[TensorResult], fail_on: str = "error"
) -> UnitVerdict:
    """Return a unit's verdict: a finding at ``fail_on`` or worse, not allowed, fails it; no verdict is no pass.

    A tensor without a verdict (``unresolved``) makes the unit inconclusive, unless the finding that says so is allowed.
    One that is not judged (``frozen``, say) does not count; if there is no other, nothing was checked: ``skipped``.
    Too small to judge is no such case: its gradient and its derivative are both known to be nearly zero.
    """
    findings, tensors = list(findings), list(tensors)
    failing = failing_severities(fail_on)
    if any(finding.severity in failing and not finding.allowed for finding in findings):
        return "fail"
    if status == "unsupported":
        return "skipped"
    if status != "complete" or any(_is_undecided(tensor, findings) for tensor in tensors):
        return "inconclusive"
    return "skipped" if set() < {tensor.verdict for tensor in tensors} <= _UNCHECKED else "pass"


def _is_undecided(tensor: TensorResult, findings: Iterable[Finding]) -> bool:
    return tensor.verdict in ("unresolved", "nondeterministic") and not any(
        finding.allowed and finding.tensor == tensor.tensor for finding in findings
    )


def describe_changes(tensors: Iterable[TensorResult]) -> str:
    """Return ``2 tensors, the worst is param:fc.weight (relative error 1.00e-03)``; empty if all agree."""
    changed = [tensor for tensor in tensors if tensor.verdict not in _AGREES]
    if not changed:
        return ""
    worst = max(changed, key=lambda tensor: tensor.error if isinstance(tensor.error, float) else math.inf)
    count = "1 tensor" if len(changed) == 1 else f"{len(changed)} tensors"
    return f"{count}, the worst is {worst.tensor} (relative error {format_number(worst.error)})"


def failing_severities(fail_on: str) -> tuple[str, ...]:
    """Return the severities that fail, worst first, down to ``fail_on``."""
    return SEVERITIES[: SEVERITIES.index(fail_on) + 1]


def run_verdict(verdicts: Sequence[UnitVerdict]) -> UnitVerdict:
    """Return the verdict of a whole run: fail before inconclusive before pass; skipped if nothing was checked."""
    for verdict in ("fail", "inconclusive", "pass"):
        if verdict in verdicts:
            return verdict
    return "skipped"


def summarise(verdicts: Iterable[UnitVerdict]) -> Summary:
    """Return the counts of units by verdict."""
    count = Counter[str](verdicts)
    return Summary(passed=count.pop("pass", 0), **count)
