"""The module that ``torch.compile`` compiles wrongly, and the part of the compiler that does it (``--bisect``).

Modules are compiled alone, down to the innermost that is wrong. The part is found by torch's own compiler bisector,
which compiles the model again and again, with a simpler backend or with one subsystem disabled after some steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gradctl.comparison.form_comparison import FormComparison, form_comparison
from gradctl.comparison.reference import Reference
from gradctl.core.findings import Finding
from gradctl.diagnosis.causes import RAISES, key_of
from gradctl.diagnosis.localise_form import with_place
from gradctl.diagnosis.localise_modules import AloneModules, capture_with
from gradctl.forms.form import CannotCapture
from gradctl.forms.silence import silenced
from gradctl.forms.source_location import SourceLocation
from gradctl.forms.table import form_named


def bisect_findings(findings: Sequence[Finding], comparison: FormComparison) -> list[Finding]:
    """Return findings about ``compile``, each error with the module that is wrong alone and the part of torch.compile.

    Args:
        findings: of form ``compile``, worst first.
        comparison: of the form.
    """
    errors = [each for each in findings if each.severity == "error"]
    if not errors:
        return list(findings)
    words, place = _words(comparison.reference), _place(errors, comparison)

    def add_place(finding: Finding) -> Finding:
        if finding.severity != "error":
            return finding
        finding = finding if place is None else with_place(finding, place)
        return msgspec.structs.replace(finding, message=f"{finding.message} {words}")

    return [add_place(each) for each in findings]


def _place(errors: Sequence[Finding], comparison: FormComparison) -> SourceLocation | None:
    """Return the innermost module that inductor gets wrong alone, by the worst tensor."""
    for finding in errors:
        if key_of(finding) != RAISES:
            difference, form = comparison.worst[key_of(finding)], form_named("compile")
            return AloneModules(
                comparison.reference, capture_with(form), difference.trial, finding, difference
            ).innermost()
    return None


def _words(reference: Reference) -> str:
    # These take a second, and only --bisect has a use for them.
    from gradctl.forms.compiled.dynamo import compile_with
    from gradctl.subject.torch_private import CompilerBisector, inductor_config

    def agrees() -> bool:
        try:
            # The bisector puts backends in inductor's place that know no options: so a patch, and no option.
            captured = compile_with("compile", reference.instance(), "inductor", {})
        except CannotCapture:
            return False
        comparison = form_comparison(reference, captured)
        comparison.compare_natively()
        return not comparison.raised and not comparison.differing

    with silenced(), inductor_config.patch(fallback_random=True):
        result: Any = CompilerBisector.do_bisect(agrees)
    if result is None:
        return "torch's compiler bisector finds no part of it alone."
    subsystem = f", subsystem {result.subsystem}" if result.subsystem else ""
    step = f", step {result.bisect_number}" if result.bisect_number else ""
    info = f" ({' '.join(result.debug_info.split())[:200]})" if result.debug_info and result.bisect_number else ""
    return f"torch's compiler bisector: backend {result.backend}{subsystem}{step}{info}."
