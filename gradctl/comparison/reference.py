"""Eager on all the inputs that a form is tried on: natively, and in float64."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import chain
from typing import Any, get_args

import torch

from gradctl.comparison.compare import tensors_of
from gradctl.comparison.difference import is_identical
from gradctl.comparison.program import CALLS, run_calls, run_copy
from gradctl.comparison.trials import ModelTrial
from gradctl.core.errors import TargetError
from gradctl.core.names import Quantity
from gradctl.forms import eager
from gradctl.forms.form import Outcome
from gradctl.subject.frames import first_line
from gradctl.subject.inputs.variations import VARIATIONS, draw_inputs, vary
from gradctl.subject.instance import InputMode, Instance, native_dtype
from gradctl.subject.loading.triton_interpreter import kernels_in_float64
from gradctl.subject.state import State
from gradctl.subject.subject import Subject
from gradctl.tracing.promotion import Promotion, default_dtype


class Reference:
    """Eager on the example and its variations.

    Args:
        subject: the model and its inputs.
        input_mode: how float inputs can be given to this model.
        calls: how many in a row on each input but the example, which has three.
        variations: of the inputs, the example first.
        name: what messages call it.
        more: more subjects by name: the same model on other inputs, or the reason why they cannot be made.
        with_numbers: whether Python's numbers are outputs, too.
        differentiable: the outputs that get a cotangent; None: each that requires a gradient.

    Attributes:
        trials: by variation, the example first; another on which eager itself raises or is not finite is left out.
        skipped: those left out, with the reason.
    """

    def __init__(
        self,
        subject: Subject,
        input_mode: InputMode,
        *,
        calls: int = CALLS,
        name: str = "eager",
        variations: Iterable[str] = VARIATIONS,
        more: Iterable[tuple[str, Subject | TargetError]] = (),
        with_numbers: bool = False,
        differentiable: frozenset[str] | None = None,
    ) -> None:
        self.subject, self.input_mode, self.calls, self.name = subject, input_mode, calls, name
        self.with_numbers, self.differentiable = with_numbers, differentiable
        self.trials: list[ModelTrial] = []
        self.skipped: list[str] = []
        self._fresh: list[ModelTrial | str] = []
        for trial_name, varied in chain(((each, vary(subject, each)) for each in variations), more):
            trial = varied.message if isinstance(varied, TargetError) else self._trial(trial_name, varied)
            if isinstance(trial, ModelTrial):
                self.trials.append(trial)
            else:
                self.skipped.append(f"{trial_name} ({trial})")

    def instance(self, *, promoted: bool = False) -> Instance:
        """Return a new private copy on the example's inputs, hooks and all."""
        return Instance(self.subject, promoted=promoted, input_mode=self.input_mode, keep_hooks=True)

    def fresh_trials(self, count: int) -> list[ModelTrial]:
        """Return trials on new random inputs and cotangents, fewer where eager raises; each is run once."""
        for seed in range(2 + len(self._fresh), 2 + count):
            subject = dataclasses.replace(draw_inputs(self.subject, seed), seed=self.subject.seed + seed)
            self._fresh.append(self._trial(f"random inputs {seed - 1}", subject))
        return [trial for trial in self._fresh[:count] if isinstance(trial, ModelTrial)]

    def promoting(self) -> AbstractContextManager[Any]:
        """Return the context of a float64 run."""
        return promoting(Promotion(native_dtype(self.subject)))

    def unpromoted_float64(self, trial: ModelTrial, calls: int) -> list[Outcome] | None:
        """Return eager's first calls on a trial in float64 without the promotion, or None if it refuses."""
        instance = Instance(trial.instance.subject, promoted=True, input_mode=self.input_mode, keep_hooks=True)
        found = run_calls(eager.capture(instance), instance, State([]), calls=calls)
        return None if found[-1].error is not None else found

    def _trial(self, name: str, subject: Subject) -> ModelTrial | str:
        """Return a trial, or why there is none."""
        count = CALLS if name == "example" else self.calls
        calls = partial(self._calls, name, subject)
        instance, native, error = calls(promoted=False, count=count)
        if error is not None and (name != "example" or not native):
            return f"{self.name} raises {first_line(error)}"
        if name != "example" and not _has_finite_value(native[0]):
            return f"{self.name}'s outputs are not finite"
        # Calls without state need no further float64 runs, which cost several native ones: what they keep from call to
        # call, if anything, has no effect on a bit of the native calls.
        is_repeated = all(_is_identical_call(native[0], call) for call in native[1:])
        promoted, oracle, _ = calls(promoted=True, count=1 if is_repeated else count)
        oracle = oracle * len(native) if is_repeated else oracle[: len(native)]
        if len(oracle) < len(native):
            return ModelTrial(name, native, native, instance=instance, float64=None)
        return ModelTrial(name, native, oracle, instance=instance, float64=promoted)

    def _calls(
        self, name: str, subject: Subject, *, promoted: bool, count: int
    ) -> tuple[Instance, list[Outcome], Exception | None]:
        """Return a new private copy, the calls of it that do not raise, and the error of the one that does."""
        instance, found = run_copy(
            name,
            subject,
            self.subject,
            promoted=promoted,
            input_mode=self.input_mode,
            calls=count,
            context=self.promoting if promoted else nullcontext,
            differentiable=self.differentiable,
            with_numbers=self.with_numbers,
        )
        return instance, [call for call in found if call.error is None], found[-1].error


def promoting(promotion: Promotion) -> AbstractContextManager[Any]:
    """Return the context of a float64 run: the promotion, of Triton's kernels too, and float64 as default dtype."""
    stack = ExitStack()
    stack.push(_compile_again)
    stack.enter_context(default_dtype(torch.float64))
    stack.enter_context(promotion)
    stack.enter_context(kernels_in_float64())
    return stack


def _is_identical_call(first: Outcome, second: Outcome) -> bool:
    """Return whether two calls have the same outputs, gradients and state, without a NaN."""
    ones, others = (
        {
            (quantity, name): value
            for quantity in get_args(Quantity)
            for name, value in tensors_of(call, quantity).items()
        }
        for call in (first, second)
    )
    same_kind = first.differentiable == second.differentiable and ones.keys() == others.keys()
    return same_kind and all(value is others[key] or is_identical(value, others[key]) for key, value in ones.items())


def _has_finite_value(call: Outcome) -> bool:
    """Return whether an element of the float outputs is finite; True if there are none."""
    floats = [t for t in call.outputs.values() if t.is_floating_point() and t.numel()]
    return not floats or any(bool(torch.isfinite(t).any()) for t in floats)


def _compile_again(raised: type[BaseException] | None, *_: object) -> None:
    """Let Dynamo forget, after a float64 run that raised, which functions it is to run as they are.

    It compiles nothing under a dispatch mode, and no later call of what it left alone there. ``torch.cond`` makes it
    compile even in eager: left alone, it raises on branches that close over parameters. A reset drops what ``aot`` and
    ``compile`` have compiled, too.
    """
    if raised is not None and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
