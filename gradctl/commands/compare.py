"""``gradctl compare``: is each static form still the model, outputs, gradients and state? Eager is judged first.

Two questions, asked apart: does the form mean the same (in float64, where it can be had), and does it round no worse
than eager does. Where gradients differ, finite differences say who is right. A form that equals eager passes, even
where eager is wrong: eager's own unit has failed already.
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from gradctl.comparison.arbiter import Arbiter
from gradctl.comparison.difference_findings import findings_and_rows, stale_values
from gradctl.comparison.form_comparison import form_comparison
from gradctl.comparison.reference import Reference
from gradctl.comparison.timing import timing_of
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.core.findings import Finding, TensorResult, Unit
from gradctl.core.names import DEFAULT_FORMS, FORMS, RANK_FORMS
from gradctl.core.verdicts import unit_verdict
from gradctl.diagnosis.bisect import bisect_findings
from gradctl.diagnosis.explanation import PreRunObservations, explain_findings
from gradctl.diagnosis.localise_form import locate_findings
from gradctl.forms.artifact import ensure_fits, ensure_loadable, load_format
from gradctl.forms.form import CannotCapture, Captured, Form
from gradctl.forms.onnx.forward import initial_values
from gradctl.forms.onnx.from_file import free_sizes, wrap_file
from gradctl.forms.table import form_named
from gradctl.gradients.baseline import Baseline, run_native
from gradctl.gradients.gradcheck import gradcheck
from gradctl.gradients.guard import explaining, unexplained
from gradctl.onnxio.onnx_file import read
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.inputs.variations import VARIATIONS, lengthen
from gradctl.subject.instance import InputMode
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.signature import module_of
from gradctl.subject.subject import Subject

STATIC_FORMS = (*(name for name in FORMS if name != "eager"), *RANK_FORMS)
DEFAULT_STATIC_FORMS = tuple(name for name in DEFAULT_FORMS if name != "eager")


def refused_unit(subject: Subject, form: str, refusal: CannotCapture, start: float) -> Unit:
    """Return the unit of a form that rejects the model; ``start`` is on the clock of ``time.perf_counter``."""
    return Unit(
        target=subject.target,
        form=form,
        status="unsupported",
        verdict="inconclusive",
        reason=refusal.reason,
        details=refusal.details or None,
        seconds=time.perf_counter() - start,
    )


class Comparing:
    """Eager, run once on all inputs, and the forms that are held against it.

    Args:
        subject: the model and its inputs; not changed.
        allows: accepted findings.
        fail_on: the severity from which a finding fails a unit.
        outputs_only: whether the forms give no gradients: then the model need not have any.
        bisect: whether torch is to say which part of its compiler is wrong, where ``compile`` is.
        wrt: which gradients the forms give, globs of names; the others are not asked of them.
        rank_seconds: the time limit of each answer of a form with many ranks.
        is_brief: whether forms run on the example alone, without variations of it, and are not timed.

    Raises:
        TargetError, NothingToCheck: as ``gradcheck``.
    """

    def __init__(
        self,
        subject: Subject,
        allows: Allows,
        *,
        fail_on: str = "error",
        outputs_only: bool = False,
        bisect: bool = False,
        wrt: Sequence[str] = ("*",),
        is_brief: bool = False,
        rank_seconds: float = 300.0,
    ) -> None:
        self.allows, self.fail_on, self.outputs_only = allows, fail_on, outputs_only
        self.bisect, self.wrt, self.is_brief, self.rank_seconds = bisect, wrt, is_brief, rank_seconds
        with silenced_run():
            self.baseline: Baseline | None = None
            input_mode: InputMode = "constant"
            raised: TargetError | None = None
            try:
                self.baseline = run_native(subject)
                subject, input_mode = self.baseline.subject, self.baseline.input_mode
            except NothingToCheck:
                if not outputs_only:
                    raise
            except TargetError as error:
                # A forward that differentiates inside may free the graph of its energy, which outputs do not need.
                if not outputs_only or error.code != "GC111":
                    raise
                raised, input_mode = error, "leaf"
            self.subject = subject
            variations = ["example"] if is_brief else VARIATIONS
            differentiable = None if raised is None else frozenset[str]()
            self.reference = Reference(subject, input_mode, variations=variations, differentiable=differentiable)
            if raised is not None and not self.reference.trials:
                raise raised
        self.arbiter = Arbiter(self.reference, allows)

    def form(self, name: str, *, named: bool) -> Unit:
        """Return the verdict on one form; one that refuses the model is skipped, or inconclusive where ``named``."""
        start = time.perf_counter()
        captured = self.capture(name, named=named)
        return captured if isinstance(captured, Unit) else self.captured(captured, form_named(name), start=start)

    def capture(self, name: str, *, named: bool) -> Captured | Unit:
        """Return the model in one form, or the unit of a form that refuses it, as ``form`` does."""
        start = time.perf_counter()
        with silenced_run():
            try:
                return form_named(name).capture(self.reference.instance())
            except CannotCapture as refusal:
                unit = refused_unit(self.subject, name, refusal, start)
                return unit if named else msgspec.structs.replace(unit, verdict="skipped")

    def _ranks(self, name: str, start: float) -> Unit:
        """Return the verdict on a model on many ranks, compared with one process."""
        # torch's parallel wrappers take half a second to import.
        from gradctl.comparison.ranks.rank_comparison import rank_comparison
        from gradctl.comparison.ranks.rank_findings import failure_finding, rank_findings
        from gradctl.diagnosis.ranks.rank_causes import explain_ranks
        from gradctl.diagnosis.ranks.rank_draws import draw_findings
        from gradctl.forms.ranks.processes import RankFailed
        from gradctl.forms.ranks.rank_form import RankForm

        if reason := self._left_open():
            return self._inconclusive(name, reason, start)
        stacks: str | None = None
        found, tensors, skipped, tried = list[Finding](), list[TensorResult](), self.reference.skipped, list[str]()
        with silenced_run(), unexplained() as failures:
            kind, _, world = name.partition(":")
            try:
                comparison = rank_comparison(self.reference, RankForm(kind, int(world)), seconds=self.rank_seconds)
                comparison.compare()
                found, tensors = findings_and_rows(comparison, self.arbiter)
                found, tensors = [*found, *rank_findings(comparison)], comparison.without_cancelled(tensors)
                with explaining(f"why {name} differs from one process"):
                    found = [*explain_ranks(found, comparison), *draw_findings(comparison)]
                skipped, tried = [*skipped, *comparison.skipped], comparison.tried
            except RankFailed as failure:
                found = [failure_finding(name, failure)]
                stacks = failure.details
            except CannotCapture as refusal:
                return refused_unit(self.subject, name, refusal, start)
            found = [*found, *failures.notes()]
        return make_unit(
            self.subject.target,
            name,
            found,
            tensors,
            allows=self.allows,
            fail_on=self.fail_on,
            reference="one process",
            reason="; ".join(f"not tried: {each}" for each in skipped) or None,
            details=stacks or failures.details(),
            seconds=time.perf_counter() - start,
            variations=tuple(tried),
        )

    def file(self, path: Path, *, trusted: bool) -> Unit:
        """Return the verdict on a file that somebody wrote: is it this model, values and all?

        Raises:
            TargetError: the file cannot be read or run, or holds another model.
            TrustError: it is code, and not ``trusted``; or ONNX with external data that lie elsewhere.
        """
        # torch's symbolic shapes take a third of a second to import, and few files are joint.
        from gradctl.forms.exported import export_joint
        from gradctl.forms.onnx import joint as onnx_joint

        instance = self.reference.instance()
        with silenced_run():
            if path.suffix.lower() == ".onnx":
                file = read(path)
                by = onnx_joint.file_gradient_targets(file)
                self.wrt = by or self.wrt
                captured = (onnx_joint.wrap_file if by else wrap_file)(file, instance)
            else:
                kind = ensure_loadable(path, trusted=trusted)
                by = export_joint.read_gradient_targets(path) if kind == "export" else ()
                self.wrt = by or self.wrt
                captured = export_joint.load_file(path, instance) if by else load_format(path, kind)
                if not by:
                    ensure_fits(captured, instance, str(path))
        unit = self.captured(captured, form_named(captured.form))
        if captured.form == "onnx":
            unit = self.at_other_sizes(unit, captured, free_sizes(captured))
        expected = self._values(captured, agrees=unit.verdict == "pass")
        findings = (*self.allows.apply(stale_values(captured, expected, path)), *unit.findings)
        verdict = unit_verdict("complete", findings, unit.tensors, self.fail_on)
        return msgspec.structs.replace(unit, findings=findings, verdict=verdict)

    def _values(self, captured: Captured, *, agrees: bool) -> dict[str, Tensor]:
        """Return what parameters and buffers of a file are to be.

        An initializer of ONNX may keep the name of a weight that another was folded into (batch norm into a conv):
        where outputs agree, all is as it should be; else what the exporter makes of the model now is asked.
        """
        if captured.form == "onnx" and agrees:
            return {}
        module = module_of(self.reference.instance().model)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())} if module is not None else {}
        return {**own, **initial_values(self.reference.instance())} if captured.form == "onnx" else own

    def captured(self, captured: Captured, form: Form, *, start: float | None = None) -> Unit:
        """Return the verdict on what was captured just now, or loaded from a file."""
        start = time.perf_counter() if start is None else start
        if captured.form in RANK_FORMS:
            return self._ranks(captured.form, start)
        if self.reference.differentiable is not None:
            captured = replace(captured, quantities=captured.quantities - {"gradient"})
        if reason := self._left_open():
            return self._inconclusive(captured.form, reason, start)
        with silenced_run(), unexplained() as failures:
            comparison = form_comparison(self.reference, captured)
            witness = PreRunObservations()
            with explaining(f"what {captured.form} starts with"):
                witness = PreRunObservations.of(captured, self.reference)
            comparison.compare_natively()
            with explaining(f"what {captured.form} does when it runs again"):
                witness.ask(comparison)
            # Timed after the first calls were compared, which TorchScript specialises on.
            timing = None if comparison.raised or self.is_brief else timing_of(captured, self.reference)
            comparison.compare_meaning(form)
            comparison.test_rounding()
            comparison.worst = {key: each for key, each in comparison.worst.items() if self._is_asked(*key)}
            found, tensors = findings_and_rows(comparison, self.arbiter)
            with explaining(f"where {captured.form} differs from eager"):
                found = locate_findings(found, comparison, form, seconds=time.perf_counter() - start)
            with explaining(f"why {captured.form} differs from eager"):
                found = explain_findings(found, comparison, witness)
            if self.bisect and captured.form == "compile":
                with explaining("which part of torch.compile is wrong"):
                    found = bisect_findings(found, comparison)
            comparison.program.state.restore()
            found = [*found, *failures.notes()]
        skipped = [f"not tried: {each}" for each in self.reference.skipped]
        return make_unit(
            self.subject.target,
            captured.form,
            found,
            tensors,
            allows=self.allows,
            fail_on=self.fail_on,
            reason="; ".join([captured.reason] * bool(captured.reason) + skipped) or None,
            details=failures.details(),
            seconds=time.perf_counter() - start,
            variations=tuple(comparison.tried),
            timing=timing,
        )

    def _is_asked(self, quantity: str, name: str) -> bool:
        return quantity != "gradient" or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.wrt)

    def at_other_sizes(self, unit: Unit, captured: Captured, dynamic: Dynamic) -> Unit:
        """Return the unit with a comparison at sizes one larger; where that fails, it is the verdict.

        Args:
            unit: the verdict at the example's sizes; one that does not pass is returned as it is.
            captured: the form.
            dynamic: the sizes that it leaves free.
        """
        if not dynamic or unit.verdict != "pass":
            return unit
        sizes = dict.fromkeys(size for axes in dynamic.values() for size in axes.values())
        named = ", ".join(f"{size} + 1" for size in sizes)
        try:
            comparing = Comparing(
                lengthen(self.subject, dynamic),
                self.allows,
                fail_on=self.fail_on,
                outputs_only=self.outputs_only,
                wrt=self.wrt,
            )
        except TargetError as error:  # not every size is one that the model itself takes
            reason = f"not tried: {named} ({error.message.partition('. ')[0].rstrip('.')})"
            return msgspec.structs.replace(unit, reason="; ".join(part for part in (unit.reason, reason) if part))
        other = comparing.captured(captured, form_named(captured.form))
        chosen = unit if other.verdict == "pass" else other
        return msgspec.structs.replace(
            chosen, variations=(*unit.variations, named), seconds=unit.seconds + other.seconds, timing=unit.timing
        )

    def put_back(self) -> None:
        """Put back the user's own tensors that could not be copied."""
        if self.baseline is not None:
            self.baseline.kept.put_back()

    def _inconclusive(self, form: str, reason: str, start: float) -> Unit:
        return Unit(
            target=self.subject.target,
            form=form,
            verdict="inconclusive",
            reason=reason,
            seconds=time.perf_counter() - start,
            tensors=self.baseline.unrepeated if self.baseline else (),
        )

    def _left_open(self) -> str:
        """Return why no form can be held against eager, or nothing."""
        if self.baseline and self.baseline.unrepeated:
            return "eager differs from itself when run twice from the same seed, so no form can be compared with it."
        return "" if self.reference.trials else f"eager has no result to compare with: {self.reference.skipped[0]}."


def compare(
    subject: Subject,
    *,
    forms: Sequence[str] = DEFAULT_STATIC_FORMS,
    named: bool = False,
    allows: Allows | Sequence[str] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    on_unit: Callable[[Unit], None] | None = None,
    **options: Any,
) -> list[Unit]:
    """Return eager's own gradcheck as the first unit, then one a form, in this process.

    Args:
        subject: the model and its inputs; not changed.
        forms: which.
        named: whether the user asked for just these: one that refuses the model is inconclusive then.
        allows, fail_on, progress: as in ``gradcheck``.
        on_unit: called with each unit as soon as it is complete.
        options: of ``Comparing``.
    """
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    say, told = progress or (lambda text: None), on_unit or (lambda unit: None)
    units: list[Unit] = []
    with preserve_generators():
        say("running eager")
        comparing = Comparing(subject, accepted, fail_on=fail_on, **options)
        try:
            say("checking eager")
            units.append(
                gradcheck(subject, allows=accepted, fail_on=fail_on, progress=progress, baseline=comparing.baseline)
            )
            told(units[-1])
            for name in forms:
                say(f"comparing {name}")
                units.append(comparing.form(name, named=named))
                told(units[-1])
        finally:
            comparing.put_back()
    return units


@contextmanager
def silenced_run() -> Iterator[None]:
    """Keep the compilers' logging to themselves; what they refuse is a reason in the report."""
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with preserve_generators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def compare_one(
    subject: Subject,
    form_name: str,
    *,
    named: bool = True,
    allows: Sequence[str] = (),
    fail_on: str = "error",
    **options: Any,
) -> Unit:
    """Return the verdict on one form: what a process of its own does; ``options`` are those of ``Comparing``."""
    return Comparing(subject, Allows(allows), fail_on=fail_on, **options).form(form_name, named=named)
