"""The user's own model in its own dtype, first of all: does it run, does it repeat itself, is it finite?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.core.errors import NothingToCheck, TargetError, is_out_of_memory
from gradctl.core.findings import Finding, TensorResult
from gradctl.core.names import Quantity
from gradctl.core.numbers import format_number, number
from gradctl.gradients.part import gaussian
from gradctl.gradients.unjudged import Kept, ObservedInstance, closed_notes, shared_note, unknown_leaf_note
from gradctl.numerics.measures import is_float, relative_error
from gradctl.numerics.point import NoGradient
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.inputs.example import first_layer_remedy, given_inputs
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.lazy_layers import build_layers, has_lazy_parameters, infer_shapes
from gradctl.subject.loading.triton_interpreter import bfloat16_refused, interpreter_refusal
from gradctl.subject.reach import walk
from gradctl.subject.subject import Subject

Named = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """What two seeded runs of the user's model showed, forward and backward. Gradients themselves are not kept."""

    input_mode: InputMode
    outputs: dict[str, Tensor]  # float outputs of the first run
    overflowing: dict[str, torch.dtype]  # native dtype by name of the leaves whose gradient is NaN or infinite
    unrepeated: tuple[TensorResult, ...]  # a row for each output and gradient that differs between the two runs
    compared: int  # how many of them there are
    subject: Subject  # with the layers that its first call builds
    notes: tuple[Finding, ...]  # on tensors that cannot be judged
    kept: Kept  # state of the user's own objects that was borrowed

    def findings(self) -> list[Finding]:
        """Return what is wrong with the model whatever its gradients are: NaN, and results that do not repeat."""
        found = [_not_finite(name, value) for name, value in self.outputs.items() if _is_nan(value)]
        if self.unrepeated:
            worst = max(self.unrepeated, key=lambda row: math.inf if isinstance(row.error, str) else row.error or 0.0)
            found.append(
                Finding(
                    code="GC412",
                    severity="warning",
                    verdict="nondeterministic",
                    quantity=worst.quantity,
                    tensor=worst.tensor,
                    message=f"two runs from the same seed differ: {len(self.unrepeated)} of {self.compared} tensors, "
                    f"{worst.tensor} by {format_number(worst.error)} (relative); nothing can be checked.",
                    hint="draw from torch's, numpy's or python's global generator, or keep the generator in the model.",
                )
            )
        return found


def run_native(subject: Subject) -> Baseline:
    """Return two runs of the model as it is.

    Inputs are given as leaves that require a gradient if the model takes that, else as clones of leaves (it changes
    them in place), else as constants (it turns them to numpy, say).

    Raises:
        TargetError: GC111 the model raises, GC113 the loss is no scalar, GC114 no tensor comes out, GC127 Triton's
            interpreter cannot run a kernel of it.
        NothingToCheck: GC110 no differentiable leaf or output.
    """
    if has_lazy_parameters(subject):
        subject = infer_shapes(subject)
    subject, watched, outputs, gradients = _with_all_leaves(subject)
    instance, first = watched.instance, watched.unknown_leaves
    again_outputs, again_gradients = run_once(watched, subject)
    rows = [
        *(_unrepeated("output", name, value, again_outputs.get(name)) for name, value in outputs.items()),
        *(_unrepeated("gradient", name, value, again_gradients.get(name)) for name, value in gradients.items()),
    ]
    unrepeated = tuple(row for row in rows if row is not None)
    # A leaf that each run makes anew is the program's own affair (it detaches, to differentiate inside).
    again = {id(tensor) for tensor in watched.unknown_leaves}
    notes = [unknown_leaf_note(tensor) for tensor in first if id(tensor) in again] + closed_notes(instance)
    notes += [shared_note(instance.shared)] if instance.shared else []
    overflowing, mode = _overflowing(gradients), instance.input_mode
    return Baseline(mode, outputs, overflowing, unrepeated, len(rows), subject, tuple(notes), watched.kept)


def first_run(subject: Subject, finally_: ExitStack) -> Baseline | None:
    """Return two native runs, whose state is put back at the end; None if there is no gradient to compare."""
    try:
        found = run_native(subject)
    except NothingToCheck:
        return None
    finally_.callback(found.kept.put_back)
    return found


def _overflowing(gradients: Named) -> dict[str, torch.dtype]:
    return {
        name: gradient.dtype
        for name, gradient in gradients.items()
        if gradient is not None and not bool(torch.isfinite(gradient).all())
    }


def _with_all_leaves(subject: Subject) -> tuple[Subject, ObservedInstance, dict[str, Tensor], Named]:
    """Return the first run, made again where that one built layers; with the subject that has them."""
    watched, outputs, gradients = _first_run(subject)
    if watched.unknown_leaves:
        held = {id(found) for _, found in walk([((), watched.instance.model)])}
        if any(id(tensor) in held for tensor in watched.unknown_leaves):
            built = build_layers(subject, watched.instance.input_mode)
            if built is not subject:
                return built, *_first_run(built)
    return subject, watched, outputs, gradients


def _unrepeated(quantity: Quantity, name: str, first: Tensor | None, second: Tensor | None) -> TensorResult | None:
    """Return a row for a tensor that differs between two runs by more than the order of a sum explains."""
    if first is None or second is None:
        if first is second:
            return None
        error, shown = math.inf, first if first is not None else second
    else:
        error, shown = relative_error(first, second), first
        if error <= 1e3 * torch.finfo(first.dtype).eps:
            return None
    assert shown is not None
    return TensorResult(
        quantity=quantity,
        tensor=name,
        verdict="nondeterministic",
        shape=tuple(shown.shape),
        dtype=str(shown.dtype).removeprefix("torch."),
        error=number(error),
    )


def _first_run(subject: Subject) -> tuple[ObservedInstance, dict[str, Tensor], Named]:
    failures: list[BaseException] = []
    modes: tuple[InputMode, ...] = ("leaf", "clone", "constant")
    for mode in modes:
        if mode == "clone" and "leaf Variable that requires grad" not in str(failures[0]):
            continue
        instance = Instance(subject, input_mode=mode)
        if not instance.leaves:
            if failures:
                break
            raise NothingToCheck(
                "GC110",
                f"{subject.target} has no differentiable leaf: no trainable parameter and no float input. "
                "Give it a float input, or unfreeze a parameter.",
            )
        try:
            watched = ObservedInstance(instance)
            return watched, *run_once(watched, subject)
        except NoGradient as error:
            raise NothingToCheck(
                "GC110",
                f"no output of {subject.target} has a gradient: each is an integer, a constant, or detached from every "
                "leaf (detach, no_grad). There is nothing to check.",
            ) from error
        except TargetError:
            raise
        except (Exception, SystemExit) as error:  # the user's model may raise anything
            if is_out_of_memory(error):
                raise
            failures.append(error)
    raise _model_raises(subject, failures[-1]) from failures[-1]


def _model_raises(subject: Subject, error: BaseException) -> TargetError:
    """Return GC111 for what the user's model raises, or GC127 if that is because of Triton's interpreter."""
    if refusal := interpreter_refusal(error):
        return refusal
    given = given_inputs(subject.model, subject.args, subject.kwargs)
    remedy = first_layer_remedy(subject.model, subject.args, subject.kwargs) if isinstance(error, Exception) else ""
    message = f"{subject.target} raises on {given}: {first_line(error)}.{remedy}"
    return TargetError("GC111", message, details=user_frames(error))


def run_once(watched: ObservedInstance, subject: Subject) -> tuple[dict[str, Tensor], Named]:
    """Return outputs and gradients of one run with unit Gaussian cotangents.

    Raises:
        TargetError: GC113 the loss is no scalar; GC127 a kernel would run on bfloat16 in Triton's interpreter.
        NoGradient: no output has a gradient.
    """
    instance = watched.instance
    with instance.preserve_leaves(), bfloat16_refused(), torch.enable_grad():
        outputs = {name: t for name, t in instance.run() if is_float(t)}
        if subject.loss is not None:
            _ensure_scalar(outputs.values())
        differentiable = [t for t in outputs.values() if t.requires_grad]
        if not differentiable:
            raise NoGradient
        watched.see(differentiable)
        torch.autograd.backward(differentiable, gaussian(differentiable, subject.seed))
        gradients = {leaf.name: leaf.take_gradient() for leaf in instance.leaves}
        return {name: t.detach().clone() for name, t in outputs.items()}, gradients


def _ensure_scalar(losses: Iterable[Tensor]) -> None:
    for loss in losses:
        if loss.numel() != 1:
            message = f"the loss returns a tensor of shape {list(loss.shape)}, not a scalar; end it in a sum or mean."
            raise TargetError("GC113", message)


def _is_nan(value: Tensor) -> bool:
    return bool(torch.isnan(value).any()) or (not bool(torch.isfinite(value).any()) and value.numel() > 0)


def _not_finite(name: str, value: Tensor) -> Finding:
    bad = int((~torch.isfinite(value)).sum())
    return Finding(
        code="GC407",
        severity="error",
        quantity="output",
        tensor=name,
        verdict="reference-wrong",
        message=f"{name} is NaN or infinite in {bad} of {value.numel()} elements; its gradient means nothing there.",
        hint="look for 0/0, log or sqrt of a negative number, or an overflow on these inputs.",
        allow=f"GC407:{name}",
    )
