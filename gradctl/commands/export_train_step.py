"""``gradctl export --graph train-step``: a whole training step in a verified ONNX file.

The file is staged beside its target, and moved into place if it makes the same steps as torch.optim: each of 20 from
torch's own state, where errors do not add up, and then 20 in a row.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from gradctl.commands.capture_to_file import Written
from gradctl.commands.compare import refused_unit
from gradctl.commands.compare_steps import plain_runs, plain_steps
from gradctl.core.allows import Allows
from gradctl.core.assembly import make_unit
from gradctl.core.errors import TargetError, listed, nearest
from gradctl.core.names import parameter_name
from gradctl.forms.artifact import place, staged_file
from gradctl.forms.form import CannotCapture
from gradctl.forms.onnx.train_step import save
from gradctl.inspection.file_contents import inspect_onnx
from gradctl.onnxio.onnx_file import read
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.inputs.variations import lengthen
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.signature import parameters_of
from gradctl.subject.subject import Subject
from gradctl.training.chosen_variants import ChosenVariant
from gradctl.training.exported_step import ExportedStep, clip_gradients, export_step
from gradctl.training.plain_runs import PlainRuns, PlainStep
from gradctl.training.step_comparison import StepComparison
from gradctl.training.step_findings import step_findings, step_rows, summarise_training
from gradctl.training.trainer import StepRecord
from gradctl.training.variant_comparison import VariantComparison
from gradctl.training.variants.table import Variant

FORM = "onnx-train-step"
_STEPS = 20
_MOST_FLIPS = 2


def export_train_step(
    subject: Subject,
    output: Path,
    *,
    optimizer: str | Callable[[Sequence[Tensor]], object] = "adamw",
    clip_norm: float | None = None,
    keeps_gradients: bool = False,
    wrt: Sequence[str] = ("*",),
    opset: int | None = None,
    dynamic: Dynamic | None = None,
    keep_unverified: bool = False,
    allows: Allows | tuple[str, ...] = (),
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Written:
    """Return the verdict on a training step in an ONNX file, against steps of torch.optim.

    Args:
        subject: the model and its inputs, and its loss unless the model returns one; not changed.
        output: where the file is to be; ``NAME.safetensors`` beside it has the state before the first step.
        optimizer: a name, ``FILE:FACTORY``, or ``factory(parameters)``; SGD, Adam or AdamW.
        clip_norm: the largest norm of all gradients together.
        keeps_gradients: whether the gradients are outputs of the graph.
        wrt: the parameters that are trained, globs of ``param:fc1.weight``; the others are constants.
        opset, dynamic, keep_unverified, allows, fail_on, progress, around: as of ``write``.

    Raises:
        TargetError, NothingToCheck, ResourceError: as ``write`` and ``compare_steps``.
    """
    say = progress or (lambda text: None)
    accepted = allows if isinstance(allows, Allows) else Allows(allows)
    start = time.perf_counter()
    with staged_file(output) as beside, around(), preserve_generators():
        subject = _freeze_others(subject, wrt)
        verified = _Verification(subject, optimizer, clip_norm, with_gradients=keeps_gradients)
        try:
            say("step 1 of 3: making steps with torch.optim")
            with verified.plain_steps(subject, _STEPS) as (runs, plain):
                say("step 2 of 3: capturing the step")
                options: dict[str, Any] = {"clip_norm": clip_norm, "keeps_gradients": keeps_gradients, "opset": opset}
                captured, initial = export_step(runs, dynamic=dynamic, **options)
                save(captured, beside, initial)
                file = read(beside)
                say("step 3 of 3: comparing the file with torch.optim")
                found = VariantComparison(ChosenVariant(FORM, Variant("")), runs)
                step = ExportedStep.of_file(file, runs.recipe)
                verified.compare(found, "each step from torch's state", plain, partial(step.from_plain, initial, plain))
                verified.compare(found, "steps in a row", plain, partial(step.in_a_row, initial, plain))
            if dynamic:
                with verified.plain_steps(lengthen(subject, dynamic), 1) as (longer, once):
                    step = ExportedStep.of_file(file, longer.recipe)
                    verified.compare(found, "another size", once, partial(step.from_plain, initial, once))
        except CannotCapture as refusal:
            return Written(refused_unit(subject, FORM, refusal, start), None, written=False)
        unit = make_unit(
            subject.target,
            FORM,
            step_findings(found),
            step_rows(found),
            allows=accepted,
            fail_on=fail_on,
            reference="torch.optim",
            reason="; ".join(dict.fromkeys(found.notes)) or None,
            seconds=time.perf_counter() - start,
            training=summarise_training(found, len(plain)),
        )
        written = unit.verdict == "pass" or keep_unverified
        if written:
            place(beside, output)
    return Written(unit, inspect_onnx(file, str(output)), written)


@dataclass(frozen=True, slots=True)
class _Verification:
    """Steps of torch.optim, with which those of a file are compared until they differ."""

    subject: Subject
    optimizer: str | Callable[[Sequence[Tensor]], object]
    clip_norm: float | None
    with_gradients: bool

    @contextmanager
    def plain_steps(self, subject: Subject, count: int) -> Iterator[tuple[PlainRuns, list[PlainStep]]]:
        """Provide the runs and the steps of torch.optim on a subject.

        Raises:
            CannotCapture: no step can be compared.
        """
        with plain_runs(
            subject, count, self.optimizer, lambda trainer: clip_gradients(trainer, self.clip_norm)
        ) as runs:
            plain = plain_steps(runs)
            if not plain:
                raise CannotCapture("the loss of the first step is not finite, so that no step can be compared.")
            yield runs, plain

    def compare(
        self,
        found: VariantComparison,
        said: str,
        plain: Sequence[PlainStep],
        records: Callable[[int], Iterable[StepRecord]],
    ) -> None:
        """Add the comparison of a file's steps, unless an earlier one found a difference.

        A relu or a max can flip on one rounding, and the state of all later steps in a row depends on it. So a step
        whose loss agrees may differ, if the steps after it, from the state of torch.optim, agree.

        Args:
            found: the comparisons so far.
            said: what messages call this one.
            plain: the steps of torch.optim.
            records: the steps of the file from a step on, which begins with the state of torch.optim.
        """
        if found.failing is not None:
            return
        judged = plain if self.with_gradients else [_without_gradients(each) for each in plain]
        flipped: list[StepComparison] = []
        start = 0
        while True:
            comparison = StepComparison(said)
            comparison.add(judged, chain((each.record for each in judged[:start]), records(start)))
            if not comparison.differs:
                break
            flipped.append(comparison)
            start = comparison.steps
            has_same_loss = bool(comparison.first) and comparison.first[0].key[0] != "output"
            if not has_same_loss or start == len(plain) or len(flipped) > _MOST_FLIPS:
                found.comparisons.append(flipped[0])
                return
        found.notes += [f"a relu or a max took another side in step {each.steps}" for each in flipped]
        for each in flipped:
            each.first, each.worst = [], {key: replace(row, is_flipped=True) for key, row in each.worst.items()}
        found.comparisons += [*flipped, comparison]


def _freeze_others(subject: Subject, wrt: Sequence[str]) -> Subject:
    """Return a copy of a subject in which the parameters that ``wrt`` does not match require no gradient.

    Raises:
        TargetError: GC104 if it matches none that does.
    """
    if "*" in wrt:
        return subject
    copy = Instance(subject, keep_hooks=True).as_subject()
    trained = {parameter_name(name): each for name, each in parameters_of(copy.model).items() if each.requires_grad}
    wanted = {name for pattern in wrt for name in fnmatch.filter(trained, pattern)}
    if not wanted:
        there = listed(list(trained)) or "none"
        said = f"--wrt {' '.join(wrt)} matches no parameter that requires a gradient{nearest(wrt[0], trained)}"
        raise TargetError("GC104", f"{said}: the parameters are {there}.")
    for name, each in trained.items():
        each.requires_grad_(name in wanted)
    return copy


def _without_gradients(step: PlainStep) -> PlainStep:
    """Return a step without its gradients, which the graph does not have: they are judged by what they update."""
    record = replace(step.record, outcome=replace(step.record.outcome, gradients={}))
    return replace(step, record=record, tensors={key: t for key, t in step.tensors.items() if key[0] != "gradient"})
