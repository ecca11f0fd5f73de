"""``gradctl gradcheck``: is autograd's gradient the derivative of the user's own model?

The order: the native model (does it run, repeat itself, stay finite), the float64 oracle, a joint screen over all
tensors, and on alarm custom Functions alone and then tensor by tensor.
"""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import torch

from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError, nearest
from gradctl.core.findings import Finding, Oracle, TensorResult, Unit
from gradctl.core.numbers import number
from gradctl.gradients.baseline import Baseline, run_native
from gradctl.gradients.directional.forces import force_findings
from gradctl.gradients.float64 import OracleRunner, cast_note, oracle_runner
from gradctl.gradients.form_runner import form_runner
from gradctl.gradients.functions.attribution import FunctionCheck, is_allowed, nothing_in_front, tensors_behind
from gradctl.gradients.functions.function_part import fault_size, function_name
from gradctl.gradients.gradient_findings import (
    GradientCause,
    cause_of,
    frozen_results,
    gradient_finding,
    native_gradient_findings,
    of_form,
    tensor_result,
    with_hooks,
)
from gradctl.gradients.gradient_notes import (
    constant_inputs_note,
    cut_notes,
    hook_notes,
    kink_note,
    not_replayed,
    too_large_note,
    undifferentiated_note,
)
from gradctl.gradients.guard import explaining, unexplained
from gradctl.gradients.hooked_gradients import leaves_behind_hooks
from gradctl.gradients.operator_contracts import operator_findings
from gradctl.gradients.regimes import Regimes, about, compare_regimes, output_noise, with_verdicts
from gradctl.gradients.wrong_calls import (
    Explanation,
    explain,
    explain_fault,
    locate_nonfinite_backwards,
    locate_nonfinite_natively,
    locate_nonfinite_outputs,
    locate_wrong_backwards,
)
from gradctl.numerics.elements import WorstElements, worst_elements
from gradctl.numerics.judge import Judge, TensorJudgement, Verdict
from gradctl.numerics.ladder import step_ladder
from gradctl.numerics.point import NoGradient
from gradctl.subject.inputs.example import trained_inputs
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch, is_users
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.recording import Recording

# A search for the call that is wrong may take so many times what the check took until its first alarm.
_TIMES_THE_CHECK = 3.0
_LEAST_SECONDS = 10.0
# The rows of one tensor cost up to 250 forwards: only the worst few have them.
_TENSORS_WITH_ROWS = 3
# The error whose chance to be missed is stated. What the user tolerates may be larger: then nothing is stated.
_OF_ERROR = 0.01


def gradcheck(
    subject: Subject,
    *,
    form: str = "eager",
    thorough: bool = False,
    probes: int = 2,
    tensor: str = "*",
    allows: Sequence[str] | Allows = (),
    rtol: float | None = None,
    atol: float | None = None,
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    baseline: Baseline | None = None,
) -> Unit:
    """Return the verdict on every gradient of the subject, against finite differences in float64.

    Args:
        subject: the model and its inputs; not changed.
        form: whose gradient is judged; finite differences are eager's always.
        thorough: probe each tensor by itself also where the joint probes are silent.
        probes: number of joint probes, and of probes a tensor.
        tensor: glob of the names to judge, for example ``param:fc1.*``.
        allows: accepted findings, ``CODE`` or ``CODE:NAME``; an accepted custom Function is excluded.
        rtol, atol: accept a gradient error up to atol + rtol ||g|| (Euclidean norm of one tensor).
        fail_on: the severity from which a finding fails the unit.
        progress: called with what is being done.
        baseline: of the subject, if the caller has it, and puts back what it borrows.

    Raises:
        TargetError: GC111 the model raises, GC112 it cannot be copied, GC115 no tensor matches, GC116 the form cannot
            take it in float64, GC117 the form has no gradients.
        NothingToCheck: GC110, also where all outputs are behind an allowed Function that cannot be excluded.
    """
    start = time.perf_counter()
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    with preserve_generators(), warnings.catch_warnings(), unexplained() as failures, ExitStack() as finally_:
        warnings.simplefilter("ignore")  # the model's own, over and over, and torch's about leaves that we made
        native = baseline or run_native(subject)
        subject = native.subject
        if baseline is None:
            finally_.callback(native.kept.put_back)
        alone = native.findings()
        notes = [*native.notes, *([constant_inputs_note()] if native.input_mode == "constant" else [])]
        operators: list[Finding] = []
        if form == "eager":
            with explaining("what opcheck finds in the operators"):
                operators = operator_findings(native)
        with explaining("the call that makes an output NaN"):
            alone = locate_nonfinite_outputs(alone, subject, native)
        if native.unrepeated:
            check = None
            findings, tensors = [*subject.notes, *operators, *alone], list(native.unrepeated)
        else:
            regimes = Regimes()
            if form == "eager":
                with explaining("what training in another regime gives"):
                    regimes = compare_regimes(subject, native)
                if regimes.own_outputs is not None:
                    native = replace(native, input_mode="constant", outputs=regimes.own_outputs)
            check = _Check(subject, native, accepted, progress or (lambda text: None), form)
            check.judge(thorough, tensor, {"probes": probes, "rtol": rtol, "atol": atol})
            if form == "eager" and tensor == "*":
                with explaining("whether forces are the derivative of an energy"):
                    operators += force_findings(check.source.runner, torch.finfo(check.source.dtype).eps)
            found, tensors = of_form(form, check.findings(), check.results())
            tensors = with_verdicts(tensors, regimes.findings) + frozen_results(subject, tensor)
            findings = [*subject.notes, *operators, *alone, *found, *about(regimes.findings, tensors), *check.notes()]
            findings += notes
        findings += failures.notes()
    return make_unit(
        subject.target,
        form,
        findings,
        tensors,
        allows=accepted,
        fail_on=fail_on,
        details=failures.details(),
        seconds=time.perf_counter() - start,
        oracle=check.oracle(probes) if check is not None else None,
    )


@dataclass(slots=True)
class _Check:
    """One run of gradcheck over the float64 runner: what is known, by index of the leaf."""

    subject: Subject
    native: Baseline
    accepted: Allows
    progress: Callable[[str], None]
    form: str = "eager"
    source: OracleRunner = field(init=False)
    probing: Judge = field(init=False)
    judged: dict[int, TensorJudgement] = field(default_factory=dict)
    behind: dict[int, GradientCause] = field(default_factory=dict)
    presumed: dict[int, GradientCause] = field(default_factory=dict)
    missed: float = 0.0
    is_tolerant: bool = False
    forwards_besides: int = 0
    wrong_calls: list[Explanation] = field(default_factory=list)
    nonfinite_calls: list[Explanation] = field(default_factory=list)
    functions: list[Finding] = field(default_factory=list)
    recording: Recording = field(default_factory=Recording)
    hooked: set[str] = field(default_factory=set)
    silent_seconds: float = 0.0
    is_searched: bool = False

    def judge(self, thorough: bool, pattern: str, settings: dict[str, Any]) -> None:
        """Fill in a verdict for each leaf whose name matches."""
        self.progress("step 1 of 4: running the model in float64")
        watch = FunctionWatch(linearised=lambda f: is_allowed(f, self.accepted))
        start = time.perf_counter()
        self.source = oracle_runner(self.subject, self.native.input_mode, watch)
        runner = self.source.runner if self.form == "eager" else form_runner(self.source.runner, self.form)
        indices = self._matching(pattern)
        settings = {**settings, "seed": self.subject.seed, "epsilon": torch.finfo(self.source.dtype).eps}
        self.is_tolerant = bool(settings["atol"]) or (settings["rtol"] or 0.0) >= _OF_ERROR
        self.progress(f"step 2 of 4: checking {len(indices)} tensors together")
        try:
            self.probing = Judge(runner, **settings)
        except NoGradient as error:
            raise nothing_in_front(self.subject.target, watch.unjudged) from error
        suspects, self.missed = self.probing.screen(indices)
        self.recording = runner.recording  # those made later see fewer directions, and fewer of its cuts move
        self.silent_seconds = time.perf_counter() - start
        self.judged = {i: self.probing.verdict_of_screen(i) for i in indices}
        self._judge_each(indices if thorough else suspects)
        self._exclude_unjudged(runner)
        if self.form == "eager":  # a form's Functions are captured or gone; eager's own check is about those
            self._find_causes(pattern, settings)

    def _exclude_unjudged(self, runner: ModelRunner) -> None:
        """Take back the verdict on tensors behind an allowed Function that states no linear map."""
        for i in tensors_behind(self.probing, runner):
            if i in self.judged and self.judged[i].verdict in ("same", "no-gradient", "too-small"):
                self.judged[i] = replace(self.judged[i], verdict="unresolved")
                self.behind[i] = GradientCause("GC408", function_name(next(iter(runner.watch.unjudged))))

    def _judge_each(self, indices: Sequence[int]) -> None:
        for count, i in enumerate(indices, 1):
            self.progress(f"step 2 of 4: tensor {count} of {len(indices)}: {self._name(i)}")
            judged, missed = self.probing.each([i])
            self.judged |= judged
            self.missed = max(self.missed, missed)
        self.judged = self.probing.settle(self.judged)

    def _name(self, i: int) -> str:
        return self.source.runner.leaves[i].name

    def _check_hooks(self) -> None:
        if self.recording.hooks or self.source.runner.instance.disabled_hooks:
            with explaining("which gradients the hooks change"):
                self.hooked = leaves_behind_hooks(self.subject, self.source)

    def _find_causes(self, pattern: str, settings: dict[str, Any]) -> None:
        """Find what makes gradients wrong: hooks, custom Functions, calls, kinks."""
        self._check_hooks()
        wrong = [i for i, each in self.judged.items() if each.is_wrong or each.verdict == "approximate"]
        # For a choice of tensors, Functions that do not concern them are not reported.
        unexplained = self._check_functions(wrong, settings) if wrong or pattern == "*" else []
        self._localise(unexplained, settings)
        located = self._located()
        self.behind |= {i: cause for i, cause in self.presumed.items() if self._name(i) not in located}
        self._accept_kinks([i for i in unexplained if i not in self.behind])

    def _check_functions(self, wrong: list[int], settings: dict[str, Any]) -> list[int]:
        """Judge the custom Functions by themselves; return what is wrong besides them."""
        if not any(map(is_users, self.source.runner.watch.classes)):
            return wrong
        self.progress("step 3 of 4: checking custom Functions alone")
        functions = FunctionCheck(self.source.runner, self.accepted, settings["epsilon"])
        tolerated = settings["rtol"] or 0.0
        with explaining("the custom Functions"):
            self.probing.point.record()
            functions.judge(is_alarmed=bool(wrong), tolerated=tolerated)
            self._judge_besides(functions, wrong, settings)
        unexplained = [i for i in wrong if i not in self.behind]
        right = {self._name(i) for i, each in self.judged.items() if each.verdict == "same" and not wrong}
        with explaining("what the custom Functions do wrong"):
            self.probing.point.record()
            found = functions.findings(right, is_explained=not unexplained)
            self.functions = [each for each in found if each.code != "GC408" or not 0 <= fault_size(each) <= tolerated]
            self._presume(functions, unexplained)
        self.probing.point.record()
        return unexplained

    def _presume(self, functions: FunctionCheck, unexplained: list[int]) -> None:
        """Take a faulty Function as the cause of what is behind it, unless a call there is found wrong."""
        for fault in functions.presumed_causes() if unexplained else ():
            names = functions.names_behind(fault)
            self.presumed |= {i: cause_of(fault) for i in unexplained if self._name(i) in names}
        self.wrong_calls = [explain_fault(fault, functions.names_behind(fault)) for fault in functions.stale.values()]

    def _judge_besides(self, functions: FunctionCheck, wrong: list[int], settings: dict[str, Any]) -> None:
        """Find which tensors are wrong only for a faulty Function: right, where its linear map replaces it."""
        linear = [fault for fault in functions.faults.values() if functions.is_linear(fault)]
        if not linear or not wrong:
            return
        besides, self.forwards_besides = functions.judge_besides(wrong, settings)
        self.judged |= besides
        self.behind |= {i: cause_of(linear[0]) for i in wrong if i not in besides}

    def _localise(self, wrong: list[int], settings: dict[str, Any]) -> None:
        """Find the calls whose backward is wrong where no Function explains it, and those that make NaN."""
        runner = self.source.runner
        if any(self.judged[i].is_wrong for i in wrong):
            self.progress("step 4 of 4: searching for the call whose backward is wrong")
            with explaining("the call whose backward is wrong"):
                self.probing.site(next(i for i in wrong if self.judged[i].is_wrong))
                start, seconds = time.perf_counter(), self._seconds()
                self.wrong_calls += locate_wrong_backwards(runner, settings, seconds)
                self.is_searched = time.perf_counter() - start < seconds
        if self._nonfinite() and not self._is_output_nonfinite():
            self.progress("step 4 of 4: searching for the call that makes NaN")
            with explaining("the call whose backward makes NaN"):
                self.probing.point.record()
                self.nonfinite_calls = locate_nonfinite_backwards(runner, self.probing.samples[0].cotangents)

    def _seconds(self) -> float:
        """Return how long an explanation may take: a few times what the check took without an alarm."""
        return max(_LEAST_SECONDS, _TIMES_THE_CHECK * self.silent_seconds)

    def _located(self) -> frozenset[str]:
        """Return the names of the leaves behind a call whose backward is wrong."""
        return frozenset[str]().union(*(each.tensors for each in self.wrong_calls))

    def _accept_kinks(self, unexplained: list[int]) -> None:
        """Accept what is wrong at the user's point alone if no part of the program is: right parts compose to a kink.

        ``relu(x) - relu(-x)`` at 0 is x, smooth; autograd's gradient there is 0, and of each part a slope it has. If
        the parts were not all judged, there is no verdict.
        """
        located = self._located()
        for i in unexplained:
            judged = self.judged[i]
            if judged.only_here and self._name(i) not in located:
                verdict: Verdict = "same" if self.is_searched else "unresolved"
                self.judged[i] = replace(judged, verdict=verdict, where="beside")

    def results(self) -> list[TensorResult]:
        """Return a row a judged leaf, with elements for the worst few."""
        leaves, nonfinite = self.source.runner.leaves, self._nonfinite()
        wrong = [i for i in self.judged if i in nonfinite or self.judged[i].is_wrong]
        worst = sorted(wrong, key=lambda i: -(self.judged[i].error or 0.0))[:_TENSORS_WITH_ROWS]
        results = []
        for i, judged in self.judged.items():
            elements = self._elements(i) if i in worst else WorstElements()
            result = tensor_result(leaves[i], judged, nonfinite=i in nonfinite, elements=elements)
            results.append(self._with_evidence(result, i) if i in worst and i not in nonfinite else result)
        return with_hooks(results, self.hooked)

    def _with_evidence(self, result: TensorResult, i: int) -> TensorResult:
        """Return a row with the finite differences at each step."""
        with explaining(f"the steps of {result.tensor}"):
            probe = self.probing.site(i).probe_at_every_step(i)
            return msgspec.structs.replace(result, ladder=step_ladder(probe.slope, probe.predicted))
        return result

    def _elements(self, i: int) -> WorstElements:
        """Return the worst elements of one tensor, and how many are wrong."""
        with explaining(f"the elements of {self._name(i)}"):
            return worst_elements(self.probing, i)
        return WorstElements()

    def findings(self) -> list[Finding]:
        """Return what is wrong: custom Functions first, then tensors, worst first."""
        leaves, nonfinite = self.source.runner.leaves, self._nonfinite()
        order = sorted(self.judged, key=lambda i: -(self.judged[i].error or 0.0))
        is_output_nonfinite = self._is_output_nonfinite()
        about = [
            gradient_finding(
                leaves[i], self.judged[i], self.behind.get(i), nonfinite.get(i), is_output_nonfinite=is_output_nonfinite
            )
            for i in order
        ]
        calls = {"GC401": self.wrong_calls, "GC403": self.wrong_calls, "GC407": self.nonfinite_calls}
        tensors = [explain(finding, calls.get(finding.code, ())) for finding in about if finding is not None]
        heads = [each for each in self.functions if each.severity == "error"]
        tails = [each for each in self.functions if each.severity != "error"]
        return [*heads, *tensors, *self._overflow(is_output_nonfinite), *tails]

    def _overflow(self, is_output_nonfinite: bool) -> list[Finding]:
        """Return a finding for each gradient that overflows in the native dtype alone, with the call that makes it."""
        overflow = native_gradient_findings(self.native, {self._name(i) for i in self._nonfinite()}, self._untrained())
        calls: list[Explanation] = []
        if overflow and not is_output_nonfinite:
            with explaining("the call whose backward overflows"):
                calls = locate_nonfinite_natively(self.subject, self.native)
        return [explain(finding, calls) for finding in overflow]

    def _untrained(self) -> set[str]:
        """Return the inputs whose gradient training does not compute: without requires_grad, beside parameters."""
        names = {leaf.name for leaf in self.source.runner.leaves}
        inputs = {name for name in names if name.startswith("input:")}
        trained = trained_inputs(self.subject.model, self.subject.args, self.subject.kwargs)
        return inputs - trained if inputs != names else set()

    def notes(self) -> list[Finding]:
        """Return what was held fixed, disabled or taken as exact."""
        runner = self.source.runner
        norms = self.probing.samples[0].norms
        without = {leaf.name for i, leaf in enumerate(runner.leaves) if norms[i] == 0}
        notes: list[Finding] = []
        with explaining("what the program cuts from the gradient"):
            notes += cut_notes(self.recording, runner.leaves, without)
        with explaining("what hooks the program has"):
            notes += hook_notes(self.recording, runner.instance.disabled_hooks, changes=bool(self.hooked))
        with explaining("which outputs have no gradient"):
            found = self.probing.point.undifferentiated(self.probing.samples[0].cotangents)
            notes += map(undifferentiated_note, found)
        with explaining("what the casts of the program change"):
            rounding = partial(output_noise, self.subject, self.native)
            cast = cast_note(self.native.outputs, self.probing.point.outputs, rounding)
            notes += [cast] if cast is not None else []
        if self.probing.point.absorbed:
            self.probing.point.record()
            notes += [too_large_note(*each) for each in self.probing.point.too_large().items()]
        beside = [self._name(i) for i, judged in self.judged.items() if judged.where == "beside"]
        notes += [kink_note(beside)] if beside else []
        return notes if self.probing.point.consistent else [not_replayed(), *notes]

    def oracle(self, probes: int) -> Oracle:
        """Return how the finite differences were made, and what they could have missed."""
        return Oracle(
            dtype=str(self.source.dtype).removeprefix("torch."),
            islands=self.source.islands,
            noise=number(self.probing.relative_noise),
            forwards=self.probing.forwards + self.forwards_besides,
            probes=probes,
            missed_with_probability=None if self.is_tolerant else number(self.missed),
            of_error=_OF_ERROR,
            held_fixed=sum(cut.moves for cut in self.recording.cuts.values()),
        )

    def _is_output_nonfinite(self) -> bool:
        return any(not self.accepted.matching(finding.allow) for finding in self.native.findings())

    def _nonfinite(self) -> dict[int, torch.Tensor]:
        return self.probing.samples[0].nonfinite

    def _matching(self, pattern: str) -> list[int]:
        leaves = self.source.runner.leaves
        indices = [
            i
            for i, leaf in enumerate(leaves)
            if leaf.tensor.numel() and any(fnmatch.fnmatchcase(name, pattern) for name in (leaf.name, *leaf.tied))
        ]
        if not indices:
            names = [leaf.name for leaf in leaves]
            listed = ", ".join(names[:4]) + (" …" if len(names) > 4 else ".")
            raise TargetError(
                "GC115",
                f"no tensor matches --tensor {pattern!r}{nearest(pattern, names)}; there are {len(names)}: {listed}",
            )
        return indices
