"""Custom ``autograd.Function``s by themselves: is each backward the derivative, whatever its caller hands it?

First order by finite differences at the recorded inputs. Then what callers do sooner or later: a cotangent with
stride 0 (``sum().backward()``), one that is not contiguous, one that is undefined, an input that asks for no
gradient; and, where the Function defines them, forward mode and second order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gradctl.gradients.backward_localisation import forward_mode_vote
from gradctl.numerics.judge import Judge
from gradctl.numerics.measures import dot, gaussian_like, norm, relative_error
from gradctl.numerics.point import rms
from gradctl.numerics.runner import Outputs
from gradctl.subject.frames import first_line, is_out_of_memory
from gradctl.subject.instance import Leaf
from gradctl.subject.seeding import seed_generators
from gradctl.subject.torch_private import FunctionBase, UndefinedGrad, tree_unflatten
from gradctl.tracing.functions import FunctionCall, is_registered_operator
from gradctl.tracing.model_runner import ModelRunner

__all__ = ["FunctionFault", "broken_contracts", "first_order_fault", "function_name", "kink_fault", "source_place"]

# Layouts of one cotangent must give one gradient, but for the order of summation.
_SAME = 1e-9
_SAME_ON_AN_ISLAND = 1e-3
# One extrapolation of this step has an error of about 1e-12 where a function is tame, and 1e-13 of rounding.
_STEP = 1e-3
_PLAINLY = 1e-7


@dataclass(frozen=True, slots=True)
class FunctionFault:
    """What is wrong with a Function.

    Attributes:
        function: the class.
        rule: what it breaks: ``first``, ``linear``, ``layout``, ``forward-mode`` or ``second``.
        message: the sentence, without a full stop.
        error: relative, summed over its inputs where several are wrong.
        caller: what a caller must do for it to matter: an ``expanded``, ``strided`` or ``shared`` cotangent, one that
            is ``undefined``, an input that is ``frozen``, ``forward-mode``, ``second-order``; None if any does.
        position: of the argument that asks for no gradient.
    """

    function: type[Function]
    rule: str
    message: str
    error: float | None = None
    caller: str | None = None
    position: int | None = None


def function_name(function: type[Function]) -> str:
    """Return the name that findings and ``--allow`` use: the class's, or ``library::op`` of a registered custom op."""
    if is_registered_operator(function):
        schema = _of_registered_op(function, "op")._schema
        return str(schema.name)
    return function.__name__


def source_place(function: type[Function]) -> tuple[str, int] | None:
    """Return file and line of a Function's backward."""
    backward: Any = function.backward if function.backward is not Function.backward else function.vjp
    if is_registered_operator(function):  # torch wraps what was given to register_autograd
        backward = _of_registered_op(function, "info")._backward_fn
    code = getattr(inspect.unwrap(backward), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code is not None else None


def _of_registered_op(function: type[Function], name: str) -> Any:
    """Return what torch's generated backward closes over: ``op``, the operator, or ``info``, what was registered."""
    closed_over = inspect.getclosurevars(function.backward).nonlocals
    if "orig_backward" in closed_over:  # an operator that takes or returns lists of tensors is wrapped once more
        closed_over = inspect.getclosurevars(closed_over["orig_backward"]).nonlocals
    return closed_over[name]


def _flat_apply(function: type[Function]) -> Callable[..., Any]:
    """Return the ``apply`` that takes what a call recorded: of an operator on lists of tensors, those flattened."""
    if is_registered_operator(function):
        flat: Callable[..., Any] = FunctionBase.__dict__["apply"].__get__(None, function)
        return flat
    return function.apply


class _FunctionRunner:
    """One Function at recorded inputs, as the oracle wants it."""

    extra = 0.0
    writes = False

    def __init__(self, call: FunctionCall, model: ModelRunner, off: int | None = None) -> None:
        self.function, self.args, self.model, self.off = call.function, call.args, model, off
        # A sparse argument is a constant here: there is no direction to move it along that keeps it sparse.
        self.positions = [
            i
            for i, arg in enumerate(call.args)
            if isinstance(arg, Tensor) and arg.requires_grad and arg.layout == torch.strided
        ]
        self.leaves: Sequence[Leaf] = [
            Leaf(_argument_name(call, i), call.args[i].detach().clone().requires_grad_(), call.args[i].dtype)
            for i in self.positions
        ]

    def arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = dict(zip(self.positions, tensors, strict=True))
        return [given.get(i, arg.clone() if isinstance(arg, Tensor) else arg) for i, arg in enumerate(self.args)]

    def apply(self, arguments: Sequence[Any]) -> Outputs:
        seed_generators(self.model.instance.subject.seed)
        with torch.enable_grad(), self.model.promoted():
            result = _flat_apply(self.function)(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        return [(f"output.{k}", t) for k, t in enumerate(results) if isinstance(t, Tensor)]

    def differentiate(self) -> Outputs:
        # Clones: a Function that changes an input in place (mark_dirty) must not be given a leaf.
        with torch.enable_grad():
            clones = [
                leaf.tensor.detach() if k == self.off else leaf.tensor.clone() for k, leaf in enumerate(self.leaves)
            ]
        return self.apply(self.arguments(clones))

    record = beside = differentiate

    def promoted(self) -> AbstractContextManager[None]:
        return self.model.promoted()

    def push(self, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return J times the tangents by output name, by the Function's own ``jvp``; raises what that raises."""
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]  # type: ignore[no-untyped-call]
            named = self.apply(self.arguments(duals))
            pushed = {name: forward_ad.unpack_dual(t).tangent for name, t in named}  # type: ignore[no-untyped-call]
        return {name: tangent for name, tangent in pushed.items() if tangent is not None}

    def gradients(self, cotangents: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor | None]:
        """Return the VJP of what ``cotangents`` makes of the differentiable outputs; None for an input without one."""
        outputs = self.outputs()
        handed = cotangents(outputs)  # drawn in float64: under the promotion, draws are rounded as the model's own are
        return self.pull(outputs, handed)

    def outputs(self) -> list[Tensor]:
        """Return the outputs that a dense cotangent can be given for."""
        return [t for _, t in self.differentiate() if t.requires_grad and t.layout == torch.strided]

    def pull(self, outputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
        """Return the VJP, dense, by leaf; None for an input without one."""
        wanted = [leaf.tensor for k, leaf in enumerate(self.leaves) if k != self.off]
        with self.promoted():
            found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
            return [g.to_dense() if g is not None and g.layout != torch.strided else g for g in found]


class _SecondOrder(_FunctionRunner):
    """(inputs, cotangents) ↦ VJP of a Function: its derivative is the double backward."""

    def __init__(self, call: FunctionCall, model: ModelRunner) -> None:
        super().__init__(call, model)
        self.inputs = len(self.leaves)
        generator = torch.Generator().manual_seed(0)
        outputs = [t for _, t in super().differentiate() if t.requires_grad and t.layout == torch.strided]
        self.leaves = [
            *self.leaves,
            *(
                Leaf(f"cotangent.{k}", gaussian_like(t, generator).requires_grad_(), t.dtype)
                for k, t in enumerate(outputs)
            ),
        ]

    def differentiate(self) -> Outputs:
        with torch.enable_grad():
            tensors = [leaf.tensor.clone() for leaf in self.leaves]
        inputs, cotangents = tensors[: self.inputs], tensors[self.inputs :]
        passed = [x.clone() for x in inputs]
        outputs = [t for _, t in self.apply(self.arguments(passed)) if t.requires_grad and t.layout == torch.strided]
        with torch.enable_grad(), self.promoted():
            found = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
        return [(f"vjp.{k}", t) for k, t in enumerate(found) if t is not None and t.requires_grad]

    record = beside = differentiate


def _is_plainly_right(runner: _FunctionRunner) -> bool:
    """Tell a gradient that four forwards along one direction over all inputs agree with.

    Any doubt (a kink, noise, an input without gradient that has a slope) is left to a ``Judge``, which is far slower.
    """
    outputs = {name: t for name, t in runner.differentiate() if t.requires_grad and t.layout == torch.strided}
    cotangents = dict(zip(outputs, _gaussian(list(outputs.values())), strict=True))
    start = {name: t.detach().clone() for name, t in outputs.items()}
    found = runner.pull(list(outputs.values()), [w.clone() for w in cotangents.values()])
    norms = [0.0 if g is None else norm(g) for g in found]
    generator = torch.Generator().manual_seed(4)
    # Each input has an equal share of the slope, one without a gradient that of the largest.
    directions = [
        gaussian_like(leaf.tensor, generator) / (max(leaf.tensor.numel(), 1) ** 0.5 * (size or max(norms) or 1.0))
        for leaf, size in zip(runner.leaves, norms, strict=True)
    ]
    length = sum(norm(v) ** 2 for v in directions) ** 0.5 or 1.0
    directions = [v / length for v in directions]
    points = [leaf.tensor.detach().clone() for leaf in runner.leaves]

    def phi(t: float) -> float:
        with torch.no_grad():
            for leaf, point, v in zip(runner.leaves, points, directions, strict=True):
                leaf.tensor.copy_(point + t * v)
        values = dict(runner.differentiate())
        return sum(dot(w, values[name].detach() - start[name]) for name, w in cotangents.items())

    try:
        coarse, fine = (phi(_STEP) - phi(-_STEP)) / (2 * _STEP), (phi(_STEP / 2) - phi(-_STEP / 2)) / _STEP
    finally:
        with torch.no_grad():
            for leaf, point in zip(runner.leaves, points, strict=True):
                leaf.tensor.copy_(point)
    stated = sum(dot(g, v) for g, v in zip(found, directions, strict=True) if g is not None)
    typical = sum((size * norm(v)) ** 2 / max(v.numel(), 1) for size, v in zip(norms, directions, strict=True)) ** 0.5
    return bool(abs((4 * fine - coarse) / 3 - stated) <= _PLAINLY * typical)


def first_order_fault(call: FunctionCall, model: ModelRunner, seed: int) -> FunctionFault | None:
    """Return what is wrong with a Function's backward at recorded inputs, or None if it is the derivative there.

    None too if it cannot be run or differentiated outside its model.
    """
    runner = _FunctionRunner(call, model)
    if not runner.leaves or not _stands_alone(runner):
        return None
    with suppress(RuntimeError, ValueError):  # a value beside the point may be refused
        if _is_plainly_right(runner):
            return None
    name = function_name(call.function)
    judge = Judge(runner, seed=seed, epsilon=_epsilon(runner))
    suspects, _ = judge.screen([i for i, leaf in enumerate(runner.leaves) if leaf.tensor.numel()])
    judged, _ = judge.each(suspects)
    wrong = {i: each for i, each in judged.items() if each.verdict in ("wrong", "missing")}
    if not wrong:
        return None
    if in_place := _in_place_fault(runner):
        return in_place
    worst = max(wrong, key=lambda i: wrong[i].error or 0.0)
    what = "gives no gradient for" if wrong[worst].verdict == "missing" else "is not the derivative in"
    places = ", ".join(repr(runner.leaves[i].name) for i in wrong)
    vote = forward_mode_vote(judge, runner.push) if _has_forward_mode(call.function) else None
    said = {"vjp": "; its jvp agrees with finite differences", "both": "; its jvp is wrong too", None: ""}[vote]
    message = f"{name}.backward {what} {places}: off by {wrong[worst].error:.2e} (relative){said}"
    # Of all inputs: an accepted Function that gets one more of them wrong is worse than it was.
    total = sum(each.error if each.error is not None else 1.0 for each in wrong.values())
    return FunctionFault(call.function, "first", message, total)


def broken_contracts(call: FunctionCall, model: ModelRunner, seed: int) -> list[FunctionFault]:
    """Return what a Function does wrong for callers other than this one, at recorded inputs where it is right."""
    runner = _FunctionRunner(call, model)
    if not runner.leaves or not _stands_alone(runner):
        return []
    expected = runner.gradients(_gaussian)
    found = [_in_place_fault(runner)]
    if found[0] is None:  # or each comparison would be with what it has changed
        found += [_linearity_fault(runner, expected), _layout_fault(runner, expected)]
        found += _input_off_faults(call, model, expected)
        found += [_forward_mode_fault(runner, expected)] if _has_forward_mode(call.function) else []
        found += [_second_order_fault(call, model, seed)]
    return [fault for fault in found if fault is not None]


def kink_fault(call: FunctionCall, model: ModelRunner) -> FunctionFault | None:
    """Return what is wrong with a backward at inputs that are a kink: its value lies outside those around it.

    For each element of a gradient, the smallest and largest values it has at points around, on either side. An element
    that is outside is looked at again at points that move it more than the others: one of many equal candidates for a
    maximum is seldom the largest by chance.
    """
    runner = _FunctionRunner(call, model)
    if not runner.leaves or not _stands_alone(runner):
        return None
    generator = torch.Generator().manual_seed(3)
    points = [leaf.tensor.detach().clone() for leaf in runner.leaves]
    values = runner.gradients(_gaussian)
    around: list[tuple[Tensor, Tensor] | None] = [None] * len(values)

    def look(moves: list[Tensor]) -> None:
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, point, move in zip(runner.leaves, points, moves, strict=True):
                    leaf.tensor.copy_(point + sign * move)
            for i, g in enumerate(runner.gradients(_gaussian)):
                if g is not None:
                    low, high = around[i] or (g, g)
                    around[i] = (torch.minimum(low, g), torch.maximum(high, g))

    def moves() -> list[Tensor]:
        return [1e-6 * max(rms(point), 1e-3) * gaussian_like(point, generator) for point in points]

    def outside(i: int) -> Tensor | None:
        value, span = values[i], around[i]
        if value is None or span is None or value.is_complex():
            return None
        slack = 1e-3 * torch.maximum(span[0].abs(), span[1].abs()).max()
        return ((value < span[0] - slack) | (value > span[1] + slack)).flatten().nonzero().flatten()

    try:
        for _ in range(4):
            look(moves())
        for i, leaf in enumerate(runner.leaves):
            elements = outside(i)
            for element in (elements if elements is not None else torch.empty(0)).tolist()[:4]:
                for _ in range(2):
                    pushed = moves()
                    pushed[i].view(-1)[element] = 10 * pushed[i].abs().max()
                    look(pushed)
                again = outside(i)
                if again is not None and element in again.tolist():
                    value, (low, high) = values[i], around[i]  # type: ignore[misc]  # it has been looked around
                    assert value is not None
                    message = (
                        f"{function_name(call.function)}.backward gives {float(value.flatten()[element]):.3g} for an "
                        f"element of {leaf.name!r} at a kink, around which it gives "
                        f"{float(low.flatten()[element]):.3g} to {float(high.flatten()[element]):.3g}"
                    )
                    return FunctionFault(call.function, "first", message)
    except Exception as error:  # the user's Function may raise anything beside the point
        _refusal(error)
    return None


def _has_forward_mode(function: type[Function]) -> bool:
    return getattr(function, "jvp", Function.jvp) is not Function.jvp


def _stands_alone(runner: _FunctionRunner) -> bool:
    """Tell whether a Function runs and differentiates outside its model; a recomputing one may want more around it."""
    try:
        outputs = runner.outputs()
        return bool(outputs) and bool(runner.pull(outputs, _gaussian(outputs)))
    except Exception as error:  # the user's backward may raise anything
        if is_out_of_memory(error):
            raise
        return False


def _gaussian(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [gaussian_like(t, generator) for t in outputs]


def _expanded(outputs: list[Tensor]) -> list[Tensor]:
    return [torch.full((), 0.7, dtype=t.dtype, device=t.device).expand(t.shape) for t in outputs]


def _strided(outputs: list[Tensor]) -> list[Tensor]:
    """Return Gaussian cotangents with gaps between elements and the dimensions the other way round: no view is flat."""
    turned = [w.permute(tuple(reversed(range(w.ndim)))) for w in _gaussian(outputs)]
    gapped = [torch.stack([w, torch.zeros_like(w)], dim=-1).select(-1, 0) for w in turned]
    return [w.permute(tuple(reversed(range(w.ndim)))) for w in gapped]


def _dense(cotangents: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda outputs: [w.clone(memory_format=torch.contiguous_format) for w in cotangents(outputs)]


def _in_place_fault(runner: _FunctionRunner) -> FunctionFault | None:
    """Look at a cotangent after backward had it: others may still read it."""
    handed: list[Tensor] = []

    def kept(outputs: list[Tensor]) -> list[Tensor]:
        handed.extend(_gaussian(outputs))
        return handed

    runner.gradients(kept)
    if all(map(torch.equal, handed, _gaussian(handed))):
        return None
    message = f"{function_name(runner.function)}.backward changes its cotangent in place"
    return FunctionFault(runner.function, "layout", message, caller="shared")


def _linearity_fault(runner: _FunctionRunner, expected: list[Tensor | None]) -> FunctionFault | None:
    """Scale one cotangent by powers of two, which is exact: a backward is linear in it, so its gradient scales too."""
    for exponent in (14, -14):
        size = 2.0**exponent

        def scaled(outputs: list[Tensor], size: float = size) -> list[Tensor]:
            return [size * w for w in _gaussian(outputs)]

        try:
            found = [None if g is None else g / size for g in runner.gradients(scaled)]
        except Exception as error:  # the user's backward may raise anything
            said = f"raises for a cotangent 2^{exponent} times as large: {_refusal(error)}"
            return FunctionFault(runner.function, "linear", f"{function_name(runner.function)}.backward {said}")
        if (off := _largest_error(runner, _gaussian, expected, found)) > 0:
            message = (
                f"{function_name(runner.function)}.backward is not linear in its cotangent: one that is 2^{exponent} "
                f"times as large gives a gradient that is not, off by {off:.2e} (relative)"
            )
            return FunctionFault(runner.function, "linear", message, off)
    return None


def _layout_fault(runner: _FunctionRunner, of_dense: list[Tensor | None]) -> FunctionFault | None:
    """Compare one cotangent in two layouts, and an undefined one with zeros."""
    function, name = runner.function, function_name(runner.function)
    layouts = (("expanded", "an expanded (stride 0)", _expanded), ("strided", "a non-contiguous", _strided))
    for caller, words, cotangents in layouts:
        expected = of_dense if cotangents is _strided else runner.gradients(_dense(cotangents))
        try:
            found = runner.gradients(cotangents)
        except Exception as error:  # the user's backward may raise anything
            message = f"{name}.backward raises for {words} cotangent: {_refusal(error)}"
            return FunctionFault(function, "layout", message, caller=caller)
        if (off := _largest_error(runner, cotangents, expected, found)) > 0:
            message = f"{name}.backward gives another gradient for {words} cotangent: off by {off:.2e} (relative)"
            return FunctionFault(function, "layout", message, off, caller)
    return _undefined_fault(runner)


def _undefined_fault(runner: _FunctionRunner) -> FunctionFault | None:
    """Let each output in turn have no cotangent (it is not used, or what follows gives none)."""
    name = function_name(runner.function)
    for k in range(len(runner.outputs())):

        def undefined(found: list[Tensor], k: int = k) -> list[Tensor]:
            return [w if j != k else torch.zeros_like(w) for j, w in enumerate(_gaussian(found))]

        expected = runner.gradients(undefined)
        try:
            found = _gradients_without(runner, k)
        except Exception as error:  # the user's backward may raise anything
            message = f"{name}.backward raises where output {k} has no cotangent (None): {_refusal(error)}"
            return FunctionFault(runner.function, "layout", message, caller="undefined")
        if (off := _largest_error(runner, undefined, expected, found)) > 0:
            message = f"{name}.backward is wrong where output {k} has no cotangent (None): off by {off:.2e} (relative)"
            return FunctionFault(runner.function, "layout", message, off, "undefined")
    return None


def _gradients_without(runner: _FunctionRunner, k: int) -> list[Tensor | None]:
    """Return gradients with output ``k``'s cotangent undefined, as torch's own UndefinedGrad makes it."""
    outputs = runner.outputs()
    cotangents = _gaussian(outputs)
    outputs[k] = UndefinedGrad()(outputs[k])
    return runner.pull(outputs, cotangents)


def _input_off_faults(call: FunctionCall, model: ModelRunner, gradients: list[Tensor | None]) -> list[FunctionFault]:
    """Let each input in turn ask for no gradient; the others' gradients must not change."""
    everything = _FunctionRunner(call, model)
    if len(everything.leaves) < 2:
        return []
    faults = []
    name = function_name(call.function)
    for k, leaf in enumerate(everything.leaves):
        runner = _FunctionRunner(call, model, off=k)
        if not runner.outputs():
            continue
        expected = [gradient for j, gradient in enumerate(gradients) if j != k]
        off, position = None, everything.positions[k]
        try:
            found = runner.gradients(_gaussian)
        except Exception as error:  # the user's backward may raise anything
            # A recomputing Function may say so where it is not given what its model always gives it; that the engine
            # refuses what it returns ("returned an incorrect number of gradients") is its own fault.
            if call.function is not model.instance.subject.function and "returned an in" not in str(error):
                continue
            message = f"{name}.backward raises where {leaf.name!r} asks for no gradient: {_refusal(error)}"
        else:
            off = _largest_error(runner, _gaussian, expected, found)
            if off == 0:
                continue
            message = f"{name}.backward changes where {leaf.name!r} asks for no gradient: off by {off:.2e} (relative)"
        faults.append(FunctionFault(call.function, "layout", message, off, "frozen", position))
    return faults


def _forward_mode_fault(runner: _FunctionRunner, gradients: list[Tensor | None]) -> FunctionFault | None:
    """Hold forward mode against reverse mode: <w, J v> = <J'w, v>."""
    generator = torch.Generator().manual_seed(1)
    tangents = [gaussian_like(leaf.tensor, generator) for leaf in runner.leaves]
    name = function_name(runner.function)
    try:
        pushed = runner.push([leaf.tensor.detach() for leaf in runner.leaves], tangents)
    except Exception as error:  # the user's jvp may raise anything
        message = f"{name}.jvp raises {_refusal(error)}"
        return FunctionFault(runner.function, "forward-mode", message, caller="forward-mode")
    differentiable = {name: t for name, t in runner.differentiate() if t.requires_grad}
    cotangents = dict(zip(differentiable, _gaussian(list(differentiable.values())), strict=True))
    products = [(w, pushed[name]) for name, w in cotangents.items() if name in pushed]
    forward = sum(dot(w, tangent) for w, tangent in products)
    reverse = sum(dot(g, v) for g, v in zip(gradients, tangents, strict=True) if g is not None)
    weight = sum(dot(g.abs(), v.abs()) for g, v in zip(gradients, tangents, strict=True) if g is not None)
    weight += sum(dot(w.abs(), tangent.abs()) for w, tangent in products)
    if abs(forward - reverse) <= _same(runner) * weight:
        return None
    message = f"{name}.jvp disagrees with its backward: <w, J v> = {forward:.6g}, <J'w, v> = {reverse:.6g}"
    return FunctionFault(runner.function, "forward-mode", message, caller="forward-mode")


def _second_order_fault(call: FunctionCall, model: ModelRunner, seed: int) -> FunctionFault | None:
    """Judge the double backward by finite differences of the backward, where there is one."""
    try:
        runner = _SecondOrder(call, model)
        if _is_plainly_right(runner):
            return None
        judge = Judge(runner, seed=seed, probes=1, epsilon=_epsilon(runner))  # one: a double backward costs much
        suspects, _ = judge.screen([i for i, leaf in enumerate(runner.leaves) if leaf.tensor.numel()])
        judged, _ = judge.each(suspects)
    except Exception as error:  # once_differentiable, or a backward that is no torch program: not offered
        _refusal(error)
        return None
    wrong = {i: each for i, each in judged.items() if each.verdict in ("wrong", "missing")}
    if not wrong:
        return None
    worst = max(wrong, key=lambda i: wrong[i].error or 0.0)
    message = (
        f"the double backward of {function_name(call.function)} is wrong in {runner.leaves[worst].name!r}: "
        f"off by {wrong[worst].error:.2e} (relative)"
    )
    return FunctionFault(call.function, "second", message, wrong[worst].error, "second-order")


def _refusal(error: Exception) -> str:
    """Return what the user's code raised; a machine without memory is no mistake of theirs, and raises on."""
    if is_out_of_memory(error):
        raise error
    return first_line(error)


def _argument_name(call: FunctionCall, position: int) -> str:
    """Return the name of an argument of ``forward``, past its ``ctx``; ``xs.0`` in a list of an operator's."""
    function = call.function
    if is_registered_operator(function):
        names = [argument.name for argument in _of_registered_op(function, "op")._schema.arguments]
        spec = getattr(call.args[-1], "input_spec", None)  # there for an operator on lists of tensors
        places = tree_unflatten(list(range(spec.num_leaves)), spec) if spec is not None else range(len(names))
        for name, place in zip(names, places, strict=False):
            if place == position or (isinstance(place, list) and position in place):
                return f"{name}.{place.index(position)}" if isinstance(place, list) else name
        return f"args.{position}"
    parameters = list(inspect.signature(function.forward).parameters.values())
    if function.setup_context is Function.setup_context:
        parameters = parameters[1:]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional[position] if position < len(positional) else f"args.{position}"


def _largest_error(
    runner: _FunctionRunner,
    cotangents: Callable[[list[Tensor]], list[Tensor]],
    expected: list[Tensor | None],
    found: list[Tensor | None],
) -> float:
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
        if error > _same(runner) and not norm(candidate - reference) <= 10 * _ulp_noise(runner, cotangents)[k]:
            errors.append(error)
    return max(errors)


def _ulp_noise(runner: _FunctionRunner, cotangents: Callable[[list[Tensor]], list[Tensor]]) -> list[float]:
    """Return how much each gradient changes, in norm, as each element of the cotangents changes by one ULP."""
    generator = torch.Generator().manual_seed(2)
    promotion = runner.model.promotion
    dtype = torch.float64 if promotion is not None and not promotion.islands else torch.float32

    def shaken(outputs: list[Tensor]) -> list[Tensor]:
        size = torch.finfo(dtype).eps
        return [w + size * w * gaussian_like(w, generator).sign() for w in dense(outputs)]

    dense = _dense(cotangents)
    exact = runner.gradients(dense)
    noise = [0.0] * len(exact)
    for _ in range(2):
        for k, (before, now) in enumerate(zip(exact, runner.gradients(shaken), strict=True)):
            if before is not None and now is not None:
                noise[k] = max(noise[k], norm(now - before))
    return noise


def _same(runner: _FunctionRunner) -> float:
    promotion = runner.model.promotion
    return _SAME if promotion is not None and not promotion.islands else _SAME_ON_AN_ISLAND


def _epsilon(runner: _FunctionRunner) -> float:
    return max((torch.finfo(leaf.tensor.dtype).eps for leaf in runner.leaves), default=torch.finfo(torch.float64).eps)
