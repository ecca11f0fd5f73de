"""What the tests of ``gradctl gradcheck`` read off its result: which tensors are wrong, which codes were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradctl.core.findings import Finding, Unit
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.subject import Subject

__all__ = ["assert_passes", "codes", "finding", "judge", "serious", "wrong_tensors"]


def judge(model: Callable[..., Any], *args: Any, kwargs: dict[str, Any] | None = None, **options: Any) -> Unit:
    """Return the unit of ``gradcheck`` for a model on its inputs; ``options`` are those of ``gradcheck``."""
    return gradcheck(Subject(target="test", model=model, args=args, kwargs=kwargs or {}), **options)


def wrong_tensors(unit: Unit) -> list[str]:
    """Return the names of the tensors whose gradient was found wrong or missing, sorted."""
    return sorted(tensor.tensor for tensor in unit.tensors if tensor.verdict in ("reference-wrong", "missing"))


def codes(unit: Unit) -> set[str]:
    """Return the codes of all findings, notes too."""
    return {finding.code for finding in unit.findings}


def serious(unit: Unit) -> list[str]:
    """Return code and message of each finding above a note that was not allowed."""
    return [f"{each.code} {each.message}" for each in unit.findings if each.severity != "note" and not each.allowed]


def finding(unit: Unit, code: str) -> Finding:
    """Return the only finding with this code."""
    (only,) = [each for each in unit.findings if each.code == code]
    return only


def assert_passes(unit: Unit) -> None:
    """Assert a clean bill: verdict pass, and nothing above a note."""
    found = (unit.verdict, unit.reason, wrong_tensors(unit), serious(unit))
    assert found == ("pass", None, [], []), found
