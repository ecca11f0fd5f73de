"""``gradctl compare REFERENCE CANDIDATE``: does another implementation compute the same outputs, gradients and state?

Both run on the inputs of the reference, with its seed, loss, cotangents and parameters. Three questions, asked apart:
does the candidate mean the same (in float64), does it round no worse than the reference in their own dtype, and does
its rounding average out. Where gradients differ, finite differences of the reference say which of the two is right.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import msgspec
import torch
from torch import Tensor

from gradctl.comparison.arbiter import Arbiter
from gradctl.comparison.candidates.candidate import (
    CandidateComparison,
    CandidateProgram,
    bind_inputs,
    capture_submodule,
    pair,
)
from gradctl.comparison.difference import ModelDifference, dtype_name
from gradctl.comparison.difference_findings import findings_and_rows
from gradctl.comparison.reference import Reference
from gradctl.comparison.trials import AFTER_EXAMPLE, NO_GRAD, ModelTrial
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError, listed
from gradctl.core.findings import Finding, TensorResult, Unit, note
from gradctl.core.names import parameter_name
from gradctl.diagnosis.causes import key_of
from gradctl.diagnosis.explanation import usual_reasons
from gradctl.diagnosis.localise_form import with_place
from gradctl.diagnosis.localise_modules import AloneModules
from gradctl.gradients.baseline import Baseline, first_run
from gradctl.gradients.gradcheck import gradcheck
from gradctl.gradients.guard import explaining, unexplained
from gradctl.numerics.measures import is_float
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.example import given_inputs
from gradctl.subject.inputs.sizes import (
    EXPANDED,
    MOST_SIZES,
    Sizes,
    sized_subjects,
    sum_over_first_axis,
    without_layout,
)
from gradctl.subject.inputs.variations import vary
from gradctl.subject.instance import InputMode, Instance, native_dtype
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.signature import call_signature, callee_name, parameters_of
from gradctl.subject.subject import Subject
from gradctl.subject.tree import map_leaves

FORM = "candidate"
# The example is what a person tries: another input must be clearly worse to be named in its place.
_TIMES_WORSE = 2.0
# If an output differs, gradients differ for that reason; if a gradient does, so do buffers.
_FIRST_CAUSES = ("GC301", "GC402", "GC403", "GC302")
_NARROW = (torch.float16, torch.bfloat16)
# Seconds in which the module that differs is looked for, at least and in multiples of the comparison.
_LEAST_SECONDS, _TIMES_THE_COMPARISON = 5.0, 1.0


def compare_candidate(
    reference: Subject,
    candidate: Subject,
    *,
    renamed: Sequence[tuple[str, str]] = (),
    own_values: bool = False,
    device: torch.device | None = None,
    sizes: Sizes = (),
    max_sizes: int = MOST_SIZES,
    allows: Allows | Sequence[str] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
) -> Unit:
    """Return whether the candidate computes what the reference does.

    Args:
        reference: a model and its inputs; not changed.
        candidate: another model; its own inputs are not used. Not changed.
        renamed: names of the reference's parameters and of the candidate's, where they differ.
        own_values: whether the candidate keeps its values; by default it gets the reference's.
        device: where the candidate runs; None: where the reference does.
        sizes: of inputs on which both run, too.
        max_sizes: the most combinations of them.
        allows, fail_on, progress: as in ``gradcheck``.

    Raises:
        TargetError: GC123 if the candidate takes other inputs or returns another structure; GC124 if parameters have no
            partner; GC111 if a model raises on the example; GC128 if an input has no such size.
    """
    start, say = time.perf_counter(), progress or (lambda text: None)
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    with preserve_generators(), warnings.catch_warnings(), unexplained() as failures, ExitStack() as finally_:
        warnings.simplefilter("ignore")
        say("running the reference and the candidate")
        both = _run_both(reference, candidate, renamed, device, finally_, own_values=own_values)
        say("comparing the candidate")
        sized = sized_subjects(both.reference, sizes, limit=max_sizes) if sizes else ()
        found = _judge(both, sized, accepted, own_values=own_values, start=start)
        notes = failures.notes()
    unit = make_unit(
        candidate.target,
        FORM,
        [*both.findings, *found.findings, *notes],
        found.rows,
        allows=accepted,
        fail_on=fail_on,
        reference=reference.target,
        reason=found.reason,
        details=failures.details(),
        seconds=time.perf_counter() - start,
        variations=tuple(found.variations),
    )
    is_open = not found.variations and unit.verdict != "fail"
    return msgspec.structs.replace(unit, verdict="inconclusive") if is_open else unit


@dataclass(frozen=True, slots=True, eq=False)
class _Both:
    """Two models that run, each twice; what was seen, and is wrong without a comparison."""

    reference: Subject
    first: Baseline | None
    program: CandidateProgram
    unrepeated: list[TensorResult]
    findings: list[Finding]


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """The result of a comparison; the reason says why nothing was compared, or what was not tried."""

    findings: Sequence[Finding] = ()
    rows: Sequence[TensorResult] = ()
    variations: Sequence[str] = ()
    reason: str | None = None


def _run_both(
    reference: Subject,
    candidate: Subject,
    renamed: Sequence[tuple[str, str]],
    device: torch.device | None,
    finally_: ExitStack,
    *,
    own_values: bool,
) -> _Both:
    reference, notes = _in_dtype_of(reference, candidate)
    first = first_run(reference, finally_)
    reference = first.subject if first else reference
    candidate, own = _bound(candidate, reference, device, finally_)
    paired = pair(reference, candidate, renamed, own_values=own_values)
    # One that takes constants only raises where the reference runs: that is said, with its error.
    mode = own.input_mode if own and own.input_mode != "constant" else _mode(first)
    program = CandidateProgram(paired=paired, reference=reference, input_mode=mode, device=device)
    runs = [run for run in (own, first) if run is not None]
    seen = {(each.code, each.tensor): each for run in runs for each in run.findings()}
    return _Both(reference, first, program, [row for run in runs for row in run.unrepeated], [*notes, *seen.values()])


def _mode(first: Baseline | None) -> InputMode:
    return first.input_mode if first else "constant"


def _judge(
    both: _Both, sized: Iterable[tuple[str, Subject | TargetError]], allows: Allows, *, own_values: bool, start: float
) -> _Found:
    if both.unrepeated:
        reason = "one of the two differs from itself when run twice from the same seed"
        return _Found(rows=both.unrepeated, reason=reason)
    more = chain(_other_uses(both.reference), sized)
    eager = Reference(both.reference, _mode(both.first), calls=1, name="the reference", more=more, with_numbers=True)
    if reason := _left_open(eager):
        return _Found(reason=reason)
    comparison = CandidateComparison(both.program, reference=eager, program=both.program, times_worse=_TIMES_WORSE)
    found, rows = _compare(comparison, Arbiter(eager, allows), own_values=own_values, start=start)
    findings = [*found, *_notes(comparison, both.first)]
    skipped = "; ".join(f"not tried: {each}" for each in eager.skipped)
    return _Found(findings, rows, comparison.tried, skipped or None)


def _other_uses(reference: Subject) -> Iterator[tuple[str, Subject]]:
    """Yield the reference as it is used otherwise, by name: ``y.sum(0)`` gives expanded cotangents, as losses do."""
    yield NO_GRAD, reference
    yield AFTER_EXAMPLE, vary(reference, "seed")
    if reference.loss is None:
        yield EXPANDED, replace(reference, loss=sum_over_first_axis)


def _bound(
    candidate: Subject, reference: Subject, device: torch.device | None, finally_: ExitStack
) -> tuple[Subject, Baseline | None]:
    """Return the candidate on the inputs of the reference, and two native runs of it.

    Raises:
        TargetError: GC123 if it does not take these inputs.
    """
    try:
        args, kwargs = bind_inputs(reference, candidate.model, reference.args, reference.kwargs)
    except TypeError as error:
        given = given_inputs(reference.model, reference.args, reference.kwargs)
        takes = f"{callee_name(candidate.model)}{call_signature(candidate.model)}"
        raise TargetError(
            "GC123",
            f"{candidate.target} does not take the inputs of {reference.target} ({given}): {error}. It is "
            f"{takes}. Write a function with the reference's signature that calls it.",
        ) from error
    args, kwargs = map_leaves(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    subject = replace(candidate, args=args, kwargs=kwargs, loss=reference.loss, seed=reference.seed)
    own = first_run(subject, finally_)
    return (own.subject if own else subject), own


def _in_dtype_of(reference: Subject, candidate: Subject) -> tuple[Subject, list[Finding]]:
    """Return the reference in the dtype of the candidate's parameters, with a note if that is not its own."""
    dtypes, own = (_float_dtypes(each) for each in (reference, candidate))
    if len(own) != 1 or not dtypes or own == dtypes:
        return reference, []
    (dtype,) = own
    model = Instance(reference).model.to(dtype)  # a private copy

    def cast(_: str, leaf: object) -> object:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype in dtypes else leaf

    args, kwargs = map_leaves(cast, (reference.args, reference.kwargs))
    names = " and ".join(sorted(map(dtype_name, dtypes)))
    said = f"the reference ({names}) is converted to {dtype_name(dtype)}, the dtype of the candidate's parameters."
    return replace(reference, model=model, args=args, kwargs=kwargs), [note("GC126", said)]


def _float_dtypes(subject: Subject) -> set[torch.dtype]:
    return {each.dtype for each in parameters_of(subject.model).values() if is_float(each)}


def _left_open(reference: Reference) -> str:
    """Return why nothing can be compared, or nothing."""
    if not reference.trials:
        return f"the reference has no result to compare with: {reference.skipped[0]}"
    dtype = native_dtype(reference.subject)
    if dtype in _NARROW and reference.trials[0].float64 is None:
        return (
            f"the reference does not run in float64, so that rounding in {dtype_name(dtype)} cannot be told from an "
            "error; compare in float32"
        )
    return ""


def _compare(
    comparison: CandidateComparison, arbiter: Arbiter, *, own_values: bool, start: float
) -> tuple[list[Finding], list[TensorResult]]:
    """Return what differs, worst first and with its place, and a row for each tensor."""
    comparison.compare_natively()
    _ensure_same_structure(comparison)
    if own_values:
        alone = {parameter_name(name) for name in comparison.program.paired.pairing.unpaired_reference}
        comparison.worst = {key: each for key, each in comparison.worst.items() if key[1] not in alone}
    comparison.compare_meaning()
    comparison.test_rounding()
    comparison.test_bias()
    found, rows = findings_and_rows(comparison, arbiter)
    with explaining("which module of the candidate differs"):
        found = _located(found, comparison, time.perf_counter() - start)
    with explaining("which Function has the wrong backward"):
        found = _with_functions(found, comparison)
    with explaining("the usual reasons for a difference"):
        found = [*usual_reasons(comparison.reference, found), *found]
    return [_with_details(each, comparison) for each in found], rows


def _ensure_same_structure(comparison: CandidateComparison) -> None:
    """Raise GC123 if the two return other tensors."""
    trial = comparison.reference.trials[0]
    calls = comparison.outcomes.get(trial.name)
    if calls is not None and calls[0].outputs.keys() != trial.native[0].outputs.keys():
        subject, program = comparison.reference.subject, comparison.program
        raise TargetError(
            "GC123",
            f"{program.paired.subject.target} returns {listed(list(calls[0].outputs))}, and {subject.target} "
            f"{listed(list(trial.native[0].outputs))}. Return the same structure of tensors from both.",
        )


def _located(found: Sequence[Finding], comparison: CandidateComparison, seconds: float) -> list[Finding]:
    """Return the findings, the first of each quantity with the innermost module that differs alone; it is the cause."""
    deadline = time.perf_counter() + max(_LEAST_SECONDS, _TIMES_THE_COMPARISON * seconds)
    errors = [n for n, each in enumerate(found) if each.severity == "error" and key_of(each) in comparison.worst]
    first = {found[number].quantity: number for number in reversed(errors)}
    located, places = list(found), {}
    for number in first.values():
        difference = comparison.worst[key_of(found[number])]
        capture = partial(capture_submodule, comparison.program.paired)
        alone = AloneModules(comparison.reference, capture, difference.trial, found[number], difference, deadline)
        place = alone.innermost()
        if place is not None and place.module:
            located[number] = with_place(found[number], place)
            places[found[number].code] = place
    code, place = next(((code, places[code]) for code in _FIRST_CAUSES if code in places), ("", None))
    if place is None:
        return located
    said = f"{place.module} ({place.op}) of the candidate differs from the reference's if both are run alone."
    return [
        msgspec.structs.replace(each, cause=code, cause_message=said) if number in errors else each
        for number, each in enumerate(located)
    ]


def _with_functions(found: Sequence[Finding], comparison: CandidateComparison) -> list[Finding]:
    """Return the findings, and before them the custom Functions with a wrong backward, of the program that is wrong."""
    verdicts = {each.verdict for each in found if each.quantity == "gradient" and each.severity == "error"}
    if not verdicts & {"wrong", "reference-wrong"}:
        return list(found)
    side, subject = "wrong", comparison.program.subject_on(comparison.reference.subject)
    if side not in verdicts:
        side, subject = "reference-wrong", comparison.reference.subject
    faults = [each for each in gradcheck(subject, allows=()).findings if each.code == "GC408"]
    if not faults:
        return list(found)
    wrong = [each.quantity == "gradient" and each.verdict == side for each in found]
    named = [
        msgspec.structs.replace(each, cause="GC408", message=f"{each.message} This is because {faults[0].message}")
        if is_wrong
        else each
        for each, is_wrong in zip(found, wrong, strict=True)
    ]
    return [*faults, *named]


def _with_details(finding: Finding, comparison: CandidateComparison) -> Finding:
    """Return an error with its kind, bias or not, and with the smallest of the sizes that were tried that has it."""
    if finding.severity != "error" or finding.code == "GC306":
        return finding
    of_all = finding.code == "GC408"
    rows = comparison.differing if of_all else [comparison.worst.get(key_of(finding))]
    differs_on = comparison.differs_on
    names = set().union(*differs_on.values()) if of_all else differs_on.get(key_of(finding), set())
    said = [_kind([row for row in rows if row is not None]), _smallest(comparison.reference.trials, names)]
    return msgspec.structs.replace(finding, message=" ".join(filter(None, [finding.message, *said])))


def _kind(rows: Sequence[ModelDifference]) -> str:
    """Return whether an error is a bias, as far as it was tried in float64."""
    if any(row.means_another for row in rows):
        return "The error is a bias: it is there in float64 too."
    dtypes = [dtype_name(each.reference.dtype) for each in rows if each.is_native_only and each.reference is not None]
    if dtypes:
        return f"The error is a bias of {dtypes[0]}: the two agree in float64, and it does not average out."
    return ""


def _smallest(trials: Sequence[ModelTrial], names: Collection[str]) -> str:
    """Return the smallest size with an error, of the trials that are named by their sizes and layout."""
    sizes = [trial.name for trial in trials if "=" in trial.name]
    smallest = next((name for name in sizes if name in names), None)
    if smallest is None:
        return ""
    plain = [without_layout(name) for name in sizes]
    end = plain.index(without_layout(smallest))
    right = listed([f"at {name}" for name in dict.fromkeys(plain[:end])], 3)
    return f"The smallest size that differs is {smallest}{f'; the two agree {right}' if end else ''}."


def _notes(comparison: CandidateComparison, first: Baseline | None) -> Iterator[Finding]:
    """Yield what was not compared, and what a reader should know of the comparison."""
    pairing = comparison.program.paired.pairing
    if pairing.by_order:
        pairs = [f"{pairing.partners[own]}={own}" for own in pairing.by_order]
        yield note("GC124", f"paired by order and shape: {listed(pairs)}.", "name other partners with --map OLD=NEW.")
    alone = [parameter_name(name) for name in (*pairing.unpaired_reference, *pairing.unpaired_candidate)]
    if alone:
        yield note("GC124", f"not compared, without a partner: {listed(alone)}.")
    if first is None:
        yield note("GC126", "the reference has no gradient (no float input, no trained parameter): outputs only.")
    if comparison.float64_error is not None:
        said = f"the candidate does not run in float64 ({first_line(comparison.float64_error)})"
        yield note("GC126", f"{said}: it is compared in {dtype_name(native_dtype(comparison.reference.subject))} only.")
