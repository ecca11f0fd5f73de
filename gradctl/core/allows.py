"""Accepted findings, ``--allow CODE[:NAME]``: matched against findings; those that matched nothing are unused."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

import msgspec

from gradctl.core.errors import GradctlError
from gradctl.core.findings import Allowance, Finding


class Allows:
    """The accepted findings of one run.

    Args:
        texts: ``GC408``, ``GC408:Round`` or ``GC401:param:fc1.*``; NAME may be a glob.

    Raises:
        GradctlError: GC151 if a text is not of that form.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._used: set[str] = set()
        for text in self.texts:
            if not re.fullmatch(r"GC\d{3}(:.+)?", text):
                said = f"--allow {text!r} is no rule code with an optional name. Give one like --allow GC408:Round."
                raise GradctlError("GC151", said)

    def matching(self, allow: str | None) -> list[str]:
        """Return the texts that accept a finding with this ``allow`` line."""
        if allow is None:
            return []
        return [text for text in self.texts if text in (allow, allow.split(":")[0]) or fnmatch.fnmatchcase(allow, text)]

    def apply(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        """Return the findings, those accepted marked as allowed; notes need no accepting."""
        applied = []
        for finding in findings:
            texts = self.matching(finding.allow) if finding.severity != "note" else []
            self._used.update(texts)
            applied.append(msgspec.structs.replace(finding, allowed=True) if texts else finding)
        return tuple(applied)

    def unused(self) -> tuple[str, ...]:
        """Return the texts that accepted nothing."""
        return tuple(text for text in self.texts if text not in self._used)

    def allowances(self) -> tuple[Allowance, ...]:
        """Return each text with whether it was needed, for the report."""
        return tuple(Allowance(allow=text, applied=text in self._used) for text in self.texts)
