"""Which part of ``torch.compile`` is wrong: torch's own compiler bisector, when it is asked for (``--bisect``).

The bisector is private to torch (``torch._inductor.compiler_bisector``, seen in 2.10 to 2.14): it compiles the model
again and again, with a simpler backend or with one subsystem switched off after so many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gradctl.checks.form_comparison import FormComparison
from gradctl.checks.reference import Reference
from gradctl.core.findings import Finding
from gradctl.forms.compiled import compiled_with
from gradctl.forms.form import CannotCapture
from gradctl.forms.quiet import quiet
from gradctl.subject.state import State

__all__ = ["bisected"]


def bisected(findings: Sequence[Finding], reference: Reference) -> list[Finding]:
    """Return findings about ``compile`` with the part of torch.compile that makes them, in the message of each error.

    Args:
        findings: of form ``compile``.
        reference: eager on all inputs.
    """
    if not any(each.severity == "error" for each in findings):
        return list(findings)
    words = _words(reference)
    return [
        msgspec.structs.replace(each, message=f"{each.message} {words}") if each.severity == "error" else each
        for each in findings
    ]


def _words(reference: Reference) -> str:
    import torch._inductor.config
    from torch._inductor.compiler_bisector import CompilerBisector

    def agrees() -> bool:
        try:
            # The bisector puts backends in inductor's place that know no options: so a patch, and no option.
            captured = compiled_with("compile", reference.instance(), "inductor", {})
        except CannotCapture:
            return False
        comparison = FormComparison(reference, captured, State([captured.model]))
        comparison.compare_natively()
        return not comparison.raised and not any(each.differs for each in comparison.worst.values())

    with quiet(), torch._inductor.config.patch(fallback_random=True):
        result: Any = CompilerBisector.do_bisect(agrees)
    if result is None:
        return "torch's compiler bisector finds no part of it alone."
    subsystem = f", subsystem {result.subsystem}" if result.subsystem else ""
    step = f", step {result.bisect_number}" if result.bisect_number else ""
    info = f" ({' '.join(result.debug_info.split())[:200]})" if result.debug_info and result.bisect_number else ""
    return f"torch's compiler bisector: backend {result.backend}{subsystem}{step}{info}."
