"""Texts that all formats share: the order of findings, counts, and the one line that a person can quote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gradctl.core.errors import listed
from gradctl.core.findings import Finding, Report, TensorResult, Unit
from gradctl.core.inspection import BufferRow, ParameterRow, Semantic
from gradctl.core.names import NOT_JUDGED, SEVERITIES, TensorVerdict, UnitVerdict
from gradctl.core.numbers import Number, format_number

# The word of each tensor verdict on the screen, worst first; those that need attention are in capitals.
VERDICT_WORDS: dict[TensorVerdict, str] = {
    "missing": "MISSING",
    "reference-wrong": "WRONG",
    "wrong": "WRONG",
    "differs": "DIFFERS",
    "nondeterministic": "NONDETERMINISTIC",
    "unresolved": "?",
    "less-accurate": "less accurate",
    "approximate": "approximate",
    "non-differentiable": "same",
    "same": "same",
    "no-gradient": "no gradient",
    "too-small": "too small",
    "behind-hook": "behind a hook",
    "frozen": "frozen",
}
# In a unit of a form, ``reference-wrong`` says that finite differences agree with the form.
RIGHT: TensorVerdict = "reference-wrong"
_FORM_WORDS: dict[TensorVerdict, str] = {
    **{verdict: word for verdict, word in VERDICT_WORDS.items() if word.isupper() and verdict != RIGHT},
    RIGHT: "right (differs from eager)",
    **{verdict: word for verdict, word in VERDICT_WORDS.items() if not word.isupper()},
}
_AGREES: tuple[TensorVerdict, ...] = ("same", "non-differentiable")
_FAILS: tuple[TensorVerdict, ...] = ("missing", "reference-wrong", "wrong", "differs")
_NO_VERDICT: tuple[TensorVerdict, ...] = ("unresolved", "nondeterministic")
# How a tensor of a unit that passes agrees: plainly, or it was accepted otherwise.
_HOW: dict[TensorVerdict, str] = {
    **dict.fromkeys(_AGREES, ""),
    "approximate": "approximately",
    "less-accurate": "less accurate",
    **dict.fromkeys(_FAILS, "wrong"),
    **dict.fromkeys(_NO_VERDICT, "not judged"),
}
_OTHERS = ("approximately", "less accurate", "wrong", "changed", "not judged", "as expected", "skipped")
# The form of a unit that compares with a snapshot: of what changed it is not known which of the two is right.
_SNAPSHOT = "snapshot"
# The text for one tensor that is not judged, and for several.
_CLASSES: dict[TensorVerdict, tuple[str, str]] = {
    "frozen": ("frozen", "frozen"),
    "no-gradient": ("receives no gradient", "receive no gradient"),
    "too-small": ("too small to judge", "too small to judge"),
    "behind-hook": ("not checked: behind a gradient hook", "not checked: behind a gradient hook"),
}
# A wrong backward, and a wrong double backward: what they make wrong is listed below them.
FUNCTION_CODES = ("GC408", "GC414")
_RANK = {verdict: rank for rank, verdict in enumerate(VERDICT_WORDS)}
# Worst first.
_WORDS_OF_UNITS: dict[UnitVerdict, str] = {"fail": "FAIL", "inconclusive": "?", "skipped": "skipped", "pass": "pass"}
_VERBS: dict[UnitVerdict, tuple[str, str]] = {  # of one unit, and of several
    "pass": ("passes", "pass"),
    "fail": ("fails", "fail"),
    "inconclusive": ("is inconclusive", "are inconclusive"),
    "skipped": ("is skipped", "are skipped"),
}
_NOT_WRITTEN = {"export": "NOT EXPORTED", "trace": "NOT CAPTURED"}  # by command, of a model that a form rejects


def differing_tensors(tensors: Iterable[TensorResult]) -> list[TensorResult]:
    """Return the tensors that do not plainly agree, worst first: by verdict, then by error, not-a-number first."""
    different = [tensor for tensor in tensors if tensor.verdict not in (*_AGREES, *NOT_JUDGED)]
    return sorted(different, key=lambda tensor: (_RANK[tensor.verdict], -_size(tensor.error)))


def failing_findings(unit: Unit) -> list[Finding]:
    """Return the findings that made the unit fail: the worst that were not allowed, errors in any case."""
    if unit.verdict != "fail":
        return []
    open_findings = [finding for finding in worst_first(unit.findings) if not finding.allowed]
    return [finding for finding in open_findings if finding.severity == open_findings[0].severity]


def is_as_expected(unit: Unit) -> bool:
    """Return whether a unit passes because its verdict is the expected one, which is not ``pass``."""
    return unit.verdict == "pass" and unit.expected not in (None, "pass")


def tensor_words(unit: Unit) -> dict[TensorVerdict, str]:
    """Return the word of each tensor verdict in this unit, worst first."""
    if unit.form == "eager":
        return VERDICT_WORDS
    return _FORM_WORDS | {RIGHT: "right (the reference is wrong)"} if unit.reference else _FORM_WORDS


def verdict_word(unit: Unit) -> str:
    """Return the word for a unit in a table of many."""
    return "expected" if is_as_expected(unit) else _WORDS_OF_UNITS[unit.verdict]


def severity_word(finding: Finding) -> str:
    """Return the word before the code of a finding."""
    return "allowed" if finding.allowed else finding.severity


def summary_of(finding: Finding) -> str:
    """Return a finding in one line: severity, code, message and location."""
    location = f" ({location_of(finding)})" if location_of(finding) else ""
    return f"{severity_word(finding)} {finding.code} {finding.message}{location}"


def location_of(each: Finding | Semantic) -> str:
    """Return the location of a finding or of a part of the program, or an empty string."""
    return str(each.location) if each.location is not None else ""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings by severity; a Function that makes gradients wrong before those gradients."""
    return sorted(
        findings, key=lambda each: (each.allowed, SEVERITIES.index(each.severity), each.code not in FUNCTION_CODES)
    )


def worst_units_first(units: Iterable[Unit]) -> list[Unit]:
    """Return the units by verdict, those that fail first and those that pass last; else in their order."""
    return sorted(units, key=lambda unit: list(_WORDS_OF_UNITS).index(unit.verdict))


def skip_lines(units: Iterable[Unit]) -> list[str]:
    """Return a line for each form and reason that units were skipped for, with how many there were."""
    reasons = Counter((unit.form, why_skipped(unit)) for unit in units if unit.verdict == "skipped")
    return [
        f"{one_line(form)} skipped in {counted(count, 'target')}: {one_line(reason)}"
        for (form, reason), count in reasons.items()
    ]


def verdict_line(report: Report) -> str:
    """Return the verdict of the run in one line, with what a pass means, or how to go on.

    That of a run that was interrupted begins with this, and does not contain the word PASS.
    """
    line = unit_line(report.units[0]) if len(report.units) == 1 else _line_of_units(report)
    if report.command in _NOT_WRITTEN:
        line = line.replace("INCONCLUSIVE: unsupported:", f"{_NOT_WRITTEN[report.command]}:")
    if report.status == "complete":
        return line
    if report.planned is not None:
        return f"INTERRUPTED: {len(report.units)} of {counted(report.planned, 'unit')} done{_verdicts(report.units)}"
    if not report.units:
        return "INTERRUPTED: nothing was checked"
    return f"INTERRUPTED, the rest was not checked; so far: {line.removeprefix('PASS: ')}"


def _verdicts(units: Sequence[Unit]) -> str:
    """Return the verdicts of units after a comma, worst first, with the rule to read: ``, 1 fails, 2 pass``."""
    counts = Counter(unit.verdict for unit in units)
    words = [f"{counts[each]} {_VERBS[each][counts[each] > 1]}" for each in _WORDS_OF_UNITS if counts[each]]
    if len(words) == 1:
        every = {1: "it", 2: "both"}.get(len(units), "all")
        words = [f"{every} {words[0].partition(' ')[2]}"]
    bad = [unit for unit in worst_units_first(units) if unit.verdict in ("fail", "inconclusive")]
    return "".join(f", {word}" for word in words) + _how_to_go_on(bad)


def _line_of_units(report: Report) -> str:
    if not report.units or report.verdict == "skipped":
        return "NOTHING CHECKED: no form of any target could be checked"
    total = counted(len(report.units), _noun_of_units(report.units))
    if report.verdict == "pass":
        return f"PASS: {_agreeing_units(report, total)}"
    units = [unit for unit in report.units if unit.verdict == report.verdict]
    if report.verdict == "inconclusive":
        return f"INCONCLUSIVE: {len(units)} of {total} not decided{_how_to_go_on(units)}"
    return f"FAIL: {_failures(units, total)}"


def _noun_of_units(units: Sequence[Unit]) -> str:
    if len({unit.target for unit in units}) > 1:
        return "unit"
    return "variant" if any(unit.training is not None for unit in units) else "form"


def _failures(failed: Sequence[Unit], total: str) -> str:
    """Return how many units fail, and which forms are right although they differ from eager."""
    right = [unit for unit in failed if is_right(unit)]
    wrong = [unit for unit in failed if unit not in right]
    if not wrong:
        return f"{len(right)} of {total} {_verb(right, 'differ')} from eager, which is wrong{_how_to_go_on(right)}"
    is_gradient = all(_bad(unit, unit.tensors, "gradient") for unit in wrong)
    verb = f"{_verb(wrong, 'compute')} a wrong gradient" if is_gradient else _verb(wrong, "fail")
    line = f"{len(wrong)} of {total} {verb}"
    if right:
        names = ", ".join(one_line(unit.form) for unit in right) if "form" in total else counted(len(right), "unit")
        line += f"; {names} {'is' if len(right) == 1 else 'are'} right and {_verb(right, 'differ')} from eager"
    return f"{line}{_how_to_go_on(wrong)}"


def _verb(units: Sequence[Unit], verb: str) -> str:
    return f"{verb}s" if len(units) == 1 else verb


def _agreeing_units(report: Report, total: str) -> str:
    as_expected = sum(map(is_as_expected, report.units))
    passed = [unit for unit in report.units if unit.verdict == "pass" and not is_as_expected(unit)]
    less_accurate = sum(any(tensor.verdict == "less-accurate" for tensor in unit.tensors) for unit in passed)
    agreeing = len(passed) - less_accurate
    rest = _others({"less accurate": less_accurate, "as expected": as_expected, "skipped": report.summary.skipped})
    return f"{agreeing} of {total} {'agrees' if agreeing == 1 else 'agree'}{rest}"


def _others(counts: Mapping[str, int]) -> str:
    return "".join(f", {counts[word]} {word}" for word in _OTHERS if counts.get(word))


def unit_line(unit: Unit) -> str:
    """Return the verdict of one unit in one line."""
    if is_as_expected(unit):
        return f"PASS: {_as_expected(unit)}{_allowed(unit)}"
    if unit.verdict == "pass":
        return f"PASS: {_agreement(unit)}"
    if unit.verdict == "skipped":
        return f"NOTHING CHECKED: {one_line(why_skipped(unit))}"
    if unit.verdict == "inconclusive":
        return f"INCONCLUSIVE: {_inconclusive(unit)}{_how_to_go_on([unit])}"
    accepted = {finding.tensor for finding in unit.findings if finding.allowed}
    wrong = _wrong([tensor for tensor in unit.tensors if tensor.tensor not in accepted], unit)
    return f"FAIL: {wrong or counted(len(failing_findings(unit)), 'finding')}{_how_to_go_on([unit])}"


def _wrong(tensors: Sequence[TensorResult], unit: Unit) -> str:
    """Return how many gradients, outputs or buffers among ``tensors`` of a unit are wrong; empty if all are right."""
    wrong = _bad(unit, tensors, "gradient") or _bad(unit, tensors, "output") or _bad(unit, tensors, "buffer")
    if not wrong:
        right = sum(tensor.verdict == RIGHT for tensor in tensors)
        verb, total = "is" if right == 1 else "are", counted_as_judged(unit, "gradient")
        reference = "the reference" if unit.reference else "eager"
        return f"{right} of {total} {verb} right where {reference} is wrong" if right else ""
    quantity = wrong[0].quantity
    total = counted_as_judged(unit, quantity)
    is_are = "is" if len(wrong) == 1 else "are"
    missing = sum(tensor.verdict == "missing" for tensor in wrong)
    word = "wrong" if not missing else "missing" if missing == len(wrong) else "wrong or missing"
    if unit.form == _SNAPSHOT and missing < len(wrong):
        return f"{len(wrong)} of {total} changed{', or is missing' if missing else ''}"
    return f"{len(wrong)} of {total} {is_are} {word}"


def _as_expected(unit: Unit) -> str:
    """Return what the unit was expected to do, and what it did."""
    assert unit.expected is not None
    what = _wrong(unit.tensors, unit) if unit.expected == "fail" else _inconclusive(unit)
    return f"{_VERBS[unit.expected][0]} as expected{f': {what}' if what else ''}"


def detection_limits(units: Sequence[Unit]) -> list[str]:
    """Return a sentence for each unit that passes against finite differences: the errors it could have missed."""
    sentences = []
    for unit in units:
        probability = unit.oracle.missed_with_probability if unit.oracle else None
        if unit.oracle is None or unit.verdict != "pass" or not isinstance(probability, (int, float)):
            continue
        name = f"{one_line(unit.target)}, {one_line(unit.form)}: " if len(units) > 1 else ""
        sentences.append(
            f"{name}at this input, an error of {100 * unit.oracle.of_error:.3g} % in any one of these tensors would "
            f"have been missed with probability {f'{probability:.0e}' if 0 < probability < 1 else f'{probability:.0f}'}"
        )
    return sentences


def not_judged(tensors: Sequence[TensorResult]) -> list[str]:
    """Return a line for each class of tensors that are not judged: how many there are, and the names of the first."""
    lines = []
    for verdict, line in zip(_present(tensors), _counted_classes(tensors), strict=True):
        lines.append(f"{line} ({first_names([tensor.tensor for tensor in tensors if tensor.verdict == verdict])})")
    return lines


def first_names(names: Sequence[str]) -> str:
    """Return the first names on one line, and how many there are beside them."""
    return listed([one_line(name) for name in names])


def why_skipped(unit: Unit) -> str:
    """Return why nothing was checked."""
    return unit.reason or ", ".join(_counted_classes(unit.tensors)) or "there was nothing to check"


def _present(tensors: Sequence[TensorResult]) -> list[TensorVerdict]:
    found = {tensor.verdict for tensor in tensors}
    return [verdict for verdict in _CLASSES if verdict in found]


def _counted_classes(tensors: Sequence[TensorResult]) -> list[str]:
    """Return ``4 frozen``, ``2 receive no gradient``: each class of what is not judged, if there is one."""
    counts = Counter(tensor.verdict for tensor in tensors)
    return [f"{counts[each]} {_CLASSES[each][counts[each] > 1]}" for each in _present(tensors)]


def counted_as_judged(unit: Unit, quantity: str) -> str:
    """Return ``6 gradients``: how many of the unit's tensors of this quantity are judged."""
    judged = [tensor for tensor in unit.tensors if tensor.quantity == quantity and tensor.verdict not in NOT_JUDGED]
    return counted(len(judged), quantity)


def counted(count: int, noun: str) -> str:
    """Return ``1 gradient``, ``6 gradients``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shape_and_dtype(tensor: TensorResult | ParameterRow | BufferRow) -> str:
    """Return ``float32[8, 3]``."""
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


TENSOR_HEADINGS = ("tensor", "type", "verdict", "relative error", "tolerance")


def tensor_row(unit: Unit, tensor: TensorResult) -> list[str]:
    """Return the cells of a unit's tensor below ``TENSOR_HEADINGS``."""
    numbers = format_number(tensor.error), format_number(tensor.budget)
    return [one_line(tensor.tensor), shape_and_dtype(tensor), tensor_words(unit)[tensor.verdict], *numbers]


def element_table(unit: Unit, tensor: TensorResult) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for the worst elements of a unit's tensor."""
    of_eager, of_snapshot = unit.form == "eager", unit.form == _SNAPSHOT
    headings = ["autograd"] if of_eager else ["reference" if unit.reference else "eager", unit.form]
    headings = ["snapshot", "now"] if of_snapshot else [*headings, "finite diff"]
    rows = []
    for each in tensor.worst:
        values = [each.reference] if of_eager else [each.reference, each.candidate]
        values += [] if of_snapshot else [each.finite_difference]
        numbers = [*values, each.absolute_error, each.relative_error]
        rows.append([f"{list(each.index)} {each.component or ''}".rstrip(), *map(format_number, numbers)])
    return ["index", *headings, "abs error", "rel error"], rows


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped: a name or message must not move the cursor or set a colour."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return ``text`` on one line."""
    return printable(" ".join(text.split()))


def _bad(unit: Unit, tensors: Sequence[TensorResult], quantity: str) -> list[TensorResult]:
    """Return the tensors of a quantity that are wrong; a form's is not if eager's is."""
    wrong = _FAILS if unit.form == "eager" else tuple(verdict for verdict in _FAILS if verdict != RIGHT)
    return [tensor for tensor in tensors if tensor.quantity == quantity and tensor.verdict in wrong]


def is_right(unit: Unit) -> bool:
    """Return whether a form fails only because it differs from eager where eager is wrong."""
    differing = [tensor for tensor in unit.tensors if tensor.verdict in _FAILS]
    errors = [finding.verdict for finding in failing_findings(unit)]
    return unit.form != "eager" and bool(differing) and {*errors, *(each.verdict for each in differing)} == {RIGHT}


def _agreement(unit: Unit) -> str:
    """Return how many gradients agree, or outputs if there are no gradients; and how many do not, but are accepted."""
    classes = ", ".join(_counted_classes(unit.tensors))
    end = f"{_allowed(unit)}{f'; {classes}' if classes else ''}"
    if unit.tensors and all(tensor.verdict in NOT_JUDGED for tensor in unit.tensors):
        return f"no gradient is large enough to compare{end}"
    quantities = {tensor.quantity for tensor in unit.tensors}
    # A training step in a file need not return its gradients: then loss, parameters and state are counted.
    is_state = unit.training is not None and "gradient" not in quantities
    quantity = "tensor" if is_state else "gradient" if "gradient" in quantities else "output"
    compared = [tensor for tensor in unit.tensors if is_state or tensor.quantity == quantity]
    counts = Counter(_HOW.get(tensor.verdict, "apart") for tensor in compared)
    if unit.form == _SNAPSHOT:
        counts["changed"] = counts.pop("wrong", 0)
    agreeing = counts[""]
    sizes = f" at {counted(len(unit.variations), 'size')} and layouts" if unit.oracle and unit.variations else ""
    return f"{counted(agreeing, quantity)} {_agree_with_reference(unit, agreeing)}{sizes}{_others(counts)}{end}"


def _agree_with_reference(unit: Unit, count: int) -> str:
    if unit.reference is None and (unit.form == "eager" or unit.oracle is not None):
        return f"{'matches' if count == 1 else 'match'} finite differences"
    return f"{'agrees' if count == 1 else 'agree'} with {printable(unit.reference or 'eager')}"


def _allowed(unit: Unit) -> str:
    count = sum(finding.allowed for finding in unit.findings)
    return f", {counted(count, 'finding')} allowed" if count else ""


def _inconclusive(unit: Unit) -> str:
    if unit.status != "complete":
        return f"{unit.status}: {one_line(unit.reason)}" if unit.reason else unit.status
    open_tensors = [tensor for tensor in unit.tensors if tensor.verdict in _NO_VERDICT]
    if not open_tensors:
        return one_line(unit.reason or ", ".join(_counted_classes(unit.tensors)) or "no verdict")
    if any(tensor.verdict == "nondeterministic" for tensor in open_tensors):
        return "the model differs from itself when run twice from the same seed"
    total = counted_as_judged(unit, open_tensors[0].quantity)
    return f"{len(open_tensors)} of {total} could not be resolved"


def _how_to_go_on(units: Sequence[Unit]) -> str:
    """Return the rule to read first: of what failed, or of what has no verdict."""
    for unit in units:
        unallowed = [finding for finding in worst_first(unit.findings) if not finding.allowed]
        inconclusive_unit = [finding for finding in unallowed if finding.verdict in _NO_VERDICT]
        for finding in [*failing_findings(unit), *inconclusive_unit, *unallowed]:
            return f" (gradctl explain {finding.cause or finding.code})"
    return ""


def _size(error: Number) -> float:
    """Return an error for sorting: what is not a finite number is worst."""
    if error is None:
        return 0.0
    return float("inf") if isinstance(error, str) else error
