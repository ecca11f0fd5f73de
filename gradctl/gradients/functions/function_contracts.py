"""Custom ``autograd.Function``s by themselves: is each backward the derivative, whatever its caller hands it?

First order by finite differences at the recorded inputs. Then what callers do sooner or later: a cotangent of stride 0
(``sum().backward()``), not contiguous or undefined, an input that requires no gradient, forward mode, second order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl.core.errors import is_out_of_memory
from gradctl.gradients.functions.function_part import DoubleBackward, FunctionFault, FunctionPart, function_name
from gradctl.gradients.part import Cotangents, expanded, forward_mode_vote, gaussian
from gradctl.numerics.judge import Judge, TensorJudgement
from gradctl.numerics.measures import dot, gaussian_like, norm, relative_error
from gradctl.numerics.point import rms
from gradctl.subject.frames import first_line
from gradctl.subject.torch_private import UndefinedGrad
from gradctl.tracing.functions import FunctionCall
from gradctl.tracing.model_runner import ModelRunner

Gradients = list[Tensor | None]


class _Case(NamedTuple):
    """One way to hand over a cotangent: the rule at stake, the end of "raises …", and what a difference means."""

    rule: str
    raises: str
    differs: str
    caller: str | None = None


def _alone(call: FunctionCall, model: ModelRunner) -> FunctionPart | None:
    """Return a Function that runs and differentiates outside its model; a recomputing one may want more around it."""
    part = FunctionPart(call, model)
    try:
        return part if part.leaves and (outputs := part.outputs()) and part.pull(outputs, gaussian(outputs)) else None
    except Exception as error:  # the user's backward may raise anything
        _refusal(error)
        return None


def first_order_fault(call: FunctionCall, model: ModelRunner, seed: int) -> FunctionFault | None:
    """Return what is wrong with a Function's backward at recorded inputs, or None if it is the derivative there.

    None too if it cannot be run or differentiated outside its model.
    """
    part = _alone(call, model)
    if part is None:
        return None
    with suppress(RuntimeError, ValueError):  # a value beside the point may be refused
        if part.is_plainly_right(0):
            return None
    judge = Judge(part, seed=seed, epsilon=part.epsilon)
    wrong = judge.wrong([i for i, leaf in enumerate(part.leaves) if leaf.tensor.numel()])
    if not wrong:
        return None
    if in_place := _in_place_fault(part):
        return in_place
    return _describe_wrong(part, judge, wrong)


def _describe_wrong(part: FunctionPart, judge: Judge, wrong: dict[int, TensorJudgement]) -> FunctionFault:
    """Return the fault of a backward that is wrong in these inputs, with what forward mode says of it."""
    worst = max(wrong, key=lambda i: wrong[i].error or 0.0)
    what = "computes no gradient for" if wrong[worst].verdict == "missing" else "is not the derivative in"
    places = ", ".join(repr(part.leaves[i].name) for i in wrong)
    vote = forward_mode_vote(judge, part.push) if _has_forward_mode(part.function) else None
    said = {"vjp": "; its jvp agrees with finite differences", "both": "; its jvp is wrong too", None: ""}[vote]
    # Of all inputs: an accepted Function that gets one more of them wrong is worse than it was.
    total = sum(each.error if each.error is not None else 1.0 for each in wrong.values())
    return part.fault("first", f"{what} {places}: off by {wrong[worst].error:.2e} (relative){said}", total)


def contract_faults(call: FunctionCall, model: ModelRunner, seed: int) -> list[FunctionFault]:
    """Return what a Function does wrong for callers other than this one, at recorded inputs where it is right."""
    part = _alone(call, model)
    if part is None:
        return []
    if in_place := _in_place_fault(part):  # each comparison would be with what it has changed
        return [in_place]
    expected = part.gradients(gaussian)
    found = [_linearity_fault(part, expected), _layout_fault(part, expected)]
    found += _input_off_faults(call, part, expected)
    found += [_forward_mode_fault(part, expected)] if _has_forward_mode(call.function) else []
    found += [_second_order_fault(call, model, seed)]
    return [fault for fault in found if fault is not None]


def kink_fault(call: FunctionCall, model: ModelRunner) -> FunctionFault | None:
    """Return what is wrong with a backward at inputs that are a kink: its value lies outside those around it.

    For each element of a gradient, the smallest and largest values it has at points around, on either side. An element
    that is outside is looked at again at points that move it more than the others: one of many equal candidates for a
    maximum is seldom the largest by chance.
    """
    part = _alone(call, model)
    if part is None:
        return None
    generator = torch.Generator().manual_seed(3)
    points = [leaf.tensor.detach().clone() for leaf in part.leaves]
    values = part.gradients(gaussian)
    around: list[tuple[Tensor, Tensor] | None] = [None] * len(values)

    def look(moves: list[Tensor]) -> None:
        for sign in (1, -1):
            part.place([point + sign * move for point, move in zip(points, moves, strict=True)])
            for i, g in enumerate(part.gradients(gaussian)):
                if g is not None:
                    low, high = around[i] or (g, g)
                    around[i] = (torch.minimum(low, g), torch.maximum(high, g))

    def moves() -> list[Tensor]:
        return [1e-6 * max(rms(point), 1e-3) * gaussian_like(point, generator) for point in points]

    def outside(i: int) -> list[int]:
        value, span = values[i], around[i]
        if value is None or span is None or value.is_complex():
            return []
        slack = 1e-3 * torch.maximum(span[0].abs(), span[1].abs()).max()
        found: list[int] = (
            ((value < span[0] - slack) | (value > span[1] + slack)).flatten().nonzero().flatten().tolist()
        )
        return found

    try:
        for _ in range(4):
            look(moves())
        for i, leaf in enumerate(part.leaves):
            for element in outside(i)[:4]:
                for _ in range(2):
                    pushed = moves()
                    pushed[i].view(-1)[element] = 10 * pushed[i].abs().max()
                    look(pushed)
                if element in outside(i):
                    given, low, high = (float(each.flatten()[element]) for each in (values[i], *around[i]))  # type: ignore[misc]
                    where = f"for an element of {leaf.name!r} at a kink, around which it gives {low:.3g} to {high:.3g}"
                    return part.fault("first", f"gives {given:.3g} {where}")
    except Exception as error:  # the user's Function may raise anything beside the point
        _refusal(error)
    return None


def _has_forward_mode(function: type[Function]) -> bool:
    return getattr(function, "jvp", Function.jvp) is not Function.jvp


def _strided(outputs: list[Tensor]) -> list[Tensor]:
    """Return Gaussian cotangents with gaps between elements and the dimensions the other way round: no view is flat."""
    turned = [w.permute(tuple(reversed(range(w.ndim)))) for w in gaussian(outputs)]
    gapped = [torch.stack([w, torch.zeros_like(w)], dim=-1).select(-1, 0) for w in turned]
    return [w.permute(tuple(reversed(range(w.ndim)))) for w in gapped]


def _contiguous(cotangents: Cotangents) -> Cotangents:
    return lambda outputs: [w.clone(memory_format=torch.contiguous_format) for w in cotangents(outputs)]


def _in_place_fault(part: FunctionPart) -> FunctionFault | None:
    """Look at a cotangent after backward had it: others may still read it."""
    outputs = part.outputs()
    handed = gaussian(outputs)
    part.pull(outputs, handed)
    if all(map(torch.equal, handed, gaussian(outputs))):
        return None
    return part.fault("layout", "changes the incoming gradient in place", caller="shared")


def _compare(
    part: FunctionPart, cotangents: Cotangents, expected: Gradients, gradients: Callable[[], Gradients], case: _Case
) -> FunctionFault | None:
    """Return a fault if ``gradients`` raises, or differs from what is ``expected`` of these cotangents."""
    try:
        found = gradients()
    except Exception as error:  # the user's backward may raise anything
        return part.fault(case.rule, f"raises {case.raises}: {_refusal(error)}", caller=case.caller)
    if (off := _largest_error(part, cotangents, expected, found)) > 0:
        return part.fault(case.rule, f"{case.differs} off by {off:.2e} (relative)", off, case.caller)
    return None


def _linearity_fault(part: FunctionPart, expected: Gradients) -> FunctionFault | None:
    """Scale one cotangent by powers of two, which is exact: a backward is linear in it, so its gradient scales too."""
    for exponent in (14, -14):

        def scaled(size: float = 2.0**exponent) -> Gradients:
            gradients = part.gradients(lambda outputs: [size * w for w in gaussian(outputs)])
            return [None if g is None else g / size for g in gradients]

        large = f"2^{exponent} times as large"
        differs = f"is not linear in the incoming gradient: for one that is {large}, its result is not,"
        case = _Case("linear", f"for an incoming gradient {large}", differs)
        if (fault := _compare(part, gaussian, expected, scaled, case)) is not None:
            return fault
    return None


def _layout_fault(part: FunctionPart, of_dense: Gradients) -> FunctionFault | None:
    """Compare one cotangent in two layouts, and an undefined one with zeros."""
    layouts: tuple[tuple[str, str, Cotangents], ...] = (
        ("expanded", "for an expanded (stride 0) incoming gradient", expanded),
        ("strided", "for a non-contiguous incoming gradient", _strided),
    )
    for caller, when, cotangents in layouts:
        expected = of_dense if cotangents is _strided else part.gradients(_contiguous(cotangents))
        case = _Case("layout", when, f"computes another gradient {when}:", caller)
        fault = _compare(part, cotangents, expected, partial(part.gradients, cotangents), case)
        if fault is not None:
            return fault
    return _undefined_fault(part)


def _undefined_fault(part: FunctionPart) -> FunctionFault | None:
    """Let each output in turn have no cotangent (it is not used, or what follows gives none)."""
    for k in range(len(part.outputs())):

        def zeros(outputs: list[Tensor], k: int = k) -> list[Tensor]:
            return [w if j != k else torch.zeros_like(w) for j, w in enumerate(gaussian(outputs))]

        def undefined(k: int = k) -> Gradients:
            outputs = part.outputs()
            cotangents = gaussian(outputs)
            outputs[k] = UndefinedGrad()(outputs[k])  # torch's own: no cotangent arrives
            return part.pull(outputs, cotangents)

        when = f"if output {k} has no gradient (None)"
        case = _Case("layout", when, f"is wrong {when}:", "undefined")
        if (fault := _compare(part, zeros, part.gradients(zeros), undefined, case)) is not None:
            return fault
    return None


def _input_off_faults(call: FunctionCall, everything: FunctionPart, gradients: Gradients) -> list[FunctionFault | None]:
    """Let each input in turn require no gradient; the others' gradients must not change."""
    faults: list[FunctionFault | None] = []
    for k, leaf in enumerate(everything.leaves if len(everything.leaves) > 1 else ()):
        part = FunctionPart(call, everything.model, off=k)
        if not part.outputs():
            continue
        when = f"if {leaf.name!r} requires no gradient"
        case = _Case("layout", when, f"changes {when}:", "frozen")
        expected = [gradient for j, gradient in enumerate(gradients) if j != k]
        fault = _compare(part, gaussian, expected, partial(part.gradients, gaussian), case)
        # A recomputing Function may say so where it is not given what its model always gives it; that the engine
        # refuses what it returns ("returned an incorrect number of gradients") is its own fault.
        is_own = call.function is everything.model.instance.subject.function
        if fault is not None and (fault.error is not None or is_own or "returned an in" in fault.message):
            faults.append(replace(fault, position=everything.positions[k]))
    return faults


def _forward_mode_fault(part: FunctionPart, gradients: Gradients) -> FunctionFault | None:
    """Compare forward mode with reverse mode: <w, J v> = <J'w, v>."""
    tangents = gaussian([leaf.tensor for leaf in part.leaves], seed=1)
    name = function_name(part.function)
    try:
        pushed = part.push([leaf.tensor.detach() for leaf in part.leaves], tangents)
    except Exception as error:  # the user's jvp may raise anything
        message = f"{name}.jvp raises {_refusal(error)}"
        return FunctionFault(part.function, "forward-mode", message, caller="forward-mode")
    products = [(w, pushed[k]) for k, w in _cotangents_by_name(part).items() if k in pushed]
    pulled = [(g, v) for g, v in zip(gradients, tangents, strict=True) if g is not None]
    forward, reverse = (sum(dot(w, v) for w, v in pairs) for pairs in (products, pulled))
    weight = sum(dot(w.abs(), v.abs()) for w, v in (*pulled, *products))
    if abs(forward - reverse) <= part.same * weight:
        return None
    message = f"{name}.jvp disagrees with its backward: <w, J v> = {forward:.6g}, <J'w, v> = {reverse:.6g}"
    return FunctionFault(part.function, "forward-mode", message, caller="forward-mode")


def _cotangents_by_name(part: FunctionPart) -> dict[str, Tensor]:
    outputs = {name: t for name, t in part.differentiate() if t.requires_grad}
    return dict(zip(outputs, gaussian(list(outputs.values())), strict=True))


def _second_order_fault(call: FunctionCall, model: ModelRunner, seed: int) -> FunctionFault | None:
    """Judge the double backward by finite differences of the backward, where there is one."""
    try:
        part = DoubleBackward(FunctionPart(call, model))
        if part.is_plainly_right(0):
            return None
        judge = Judge(part, seed=seed, probes=1, epsilon=part.epsilon)  # one: a double backward costs much
        wrong = judge.wrong([i for i, leaf in enumerate(part.leaves) if leaf.tensor.numel()])
    except Exception as error:  # once_differentiable, or a backward that is no torch program: not offered
        _refusal(error)
        return None
    if not wrong:
        return None
    worst = max(wrong, key=lambda i: wrong[i].error or 0.0)
    message = (
        f"the double backward of {function_name(call.function)} is wrong in {part.leaves[worst].name!r}: "
        f"off by {wrong[worst].error:.2e} (relative)"
    )
    return FunctionFault(call.function, "second", message, wrong[worst].error, "second-order")


def _refusal(error: Exception) -> str:
    """Return what the user's code raised; a machine without memory is no mistake of theirs, and raises on."""
    if is_out_of_memory(error):
        raise error
    return first_line(error)


def _largest_error(part: FunctionPart, cotangents: Cotangents, expected: Gradients, found: Gradients) -> float:
    """Return the largest relative error that rounding does not explain, 0 if there is none; None and zero are the same.

    A gradient that is zero by cancellation is another with each order of a sum. So an error counts if it is above the
    tolerance relative to the gradient's norm, and above what it changes as the cotangents change by one ULP.
    """
    errors = [0.0]
    for k, (before, now) in enumerate(zip(expected, found, strict=True)):
        if before is None and now is None:
            continue
        zero = torch.zeros_like(now if before is None else before)  # type: ignore[arg-type]  # one of them is a tensor
        reference, candidate = zero if before is None else before, zero if now is None else now
        error = relative_error(reference, candidate)
        if error > part.same and not norm(candidate - reference) <= 10 * _ulp_noise(part, cotangents)[k]:
            errors.append(error)
    return max(errors)


def _ulp_noise(part: FunctionPart, cotangents: Cotangents) -> list[float]:
    """Return how much each gradient changes, in norm, as each element of the cotangents changes by one ULP."""
    generator = torch.Generator().manual_seed(2)
    dense = _contiguous(cotangents)

    def shaken(outputs: list[Tensor]) -> list[Tensor]:
        return [w + part.ulp * w * gaussian_like(w, generator).sign() for w in dense(outputs)]

    exact = part.gradients(dense)
    noise = [0.0] * len(exact)
    for _ in range(2):
        for k, (before, now) in enumerate(zip(exact, part.gradients(shaken), strict=True)):
            if before is not None and now is not None:
                noise[k] = max(noise[k], norm(now - before))
    return noise
