"""Custom Functions judged where the model applies them: along the directions in which its leaves move their inputs.

At the point, a cotangent u is drawn for the outputs of an application, and its backward gives g = VJP(u). Beside it, at
theta + t v, the application has inputs x(t) and outputs y(t). The backward is right along x'(0) exactly if
psi(t) = <u, y(t)> - <g, x(t)> has no slope at 0. One run of the model beside the point serves all applications, and
only numbers are kept of it. What moves the inputs moves them as the model does: symmetric ones stay symmetric.

A Function is differentiated in those outputs only that get a cotangent in the model's own backward.

First each application is differentiated alone, on copies: u is random. A backward that is right there can be wrong with
the model's own memory (expanded or shared inputs, a cotangent that is not contiguous): then u and g are those of the
application's own node in a backward of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from gradctl.gradients.functions.function_part import argument_name
from gradctl.gradients.functions.survey import Application, layout, numbered, observed, run_backward
from gradctl.gradients.part import gaussian
from gradctl.numerics.ladder import Slope, noise_floor, slope_at_zero
from gradctl.numerics.measures import dense, dot, gaussian_like, norm
from gradctl.numerics.point import Point, Sample, moved_values, natural_scale, rms
from gradctl.numerics.runner import refusals_ignored
from gradctl.numerics.site import Site
from gradctl.subject.seeding import preserve_generators
from gradctl.tracing.functions import FunctionCall, copied_arguments
from gradctl.tracing.graph import node_of
from gradctl.tracing.linear_map import keeps_what_it_saves
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.tracer import Apply, FunctionClass

# One level of the ladder: where both halves of psi are smooth it resolves 1e-9, and four runs are all that is needed.
_STEP = 3.07e-2 / 4
_RESOLVED = 1e-6
_APPROXIMATE = 1e-4
# Copies of arguments and outputs are kept for so many bytes of them at once; what does not fit takes another sweep.
_BYTES_AT_ONCE = 2**29

_LAYOUTS = {"expanded": "expanded (stride 0)", "strided": "not contiguous"}

Verdict = Literal["right", "wrong", "approximate", "unresolved", "unmoved"]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The verdict on one application: ``unmoved`` if the leaves do not move its inputs, so that nothing is judged."""

    application: Application
    call: FunctionCall  # at the point
    verdict: Verdict
    error: float = 0.0  # relative to the derivative along this direction
    kinked: bool = False  # whether the point is a kink of this application
    memory: tuple[str, ...] = ()  # what is unusual about the memory that the model hands it, if judged in place


def judge_applications(
    runner: ModelRunner, applications: Sequence[Application], seed: int, epsilon: float, *, in_place: bool = False
) -> list[Judged]:
    """Return a verdict on each of the applications, made at the present values of the leaves.

    Alone, what is at a kink there is judged beside it; what the leaves do not move, where no parameter is zero.
    ``in_place``, each is judged by its own node in a backward of the model. The runner is left at another point.
    """
    origin = [leaf.tensor.detach().clone() for leaf in runner.leaves]
    generator = torch.Generator().manual_seed(seed + 2)
    found: list[Judged] = []
    with runner.instance.preserve_leaves():
        for window in _windows(applications):
            if in_place:
                found += _SweepInPlace(runner, window, origin, generator, epsilon).judge().values()
            else:
                found += _judge_alone(runner, window, origin, generator, epsilon)
    return found


def _windows(applications: Sequence[Application]) -> Iterator[list[Application]]:
    window: list[Application] = []
    size = 0
    for application in applications:
        if window and size + application.bytes > _BYTES_AT_ONCE:
            yield window
            window, size = [], 0
        window.append(application)
        size += application.bytes
    if window:
        yield window


def _judge_alone(
    runner: ModelRunner, window: list[Application], origin: list[Tensor], generator: torch.Generator, epsilon: float
) -> list[Judged]:
    def sweep(wanted: list[Application], values: list[Tensor]) -> dict[int, Judged]:
        return _Sweep(runner, wanted, values, generator, epsilon).judge()

    judged = sweep(window, origin)
    for verdict, elsewhere in (("unresolved", _beside), ("unmoved", _without_zeros)):
        pending = [
            each.application
            for each in judged.values()
            if each.verdict == verdict and not runner.watch.linearised(each.application.function)
        ]
        if pending:
            for number, again in sweep(pending, elsewhere(origin, generator)).items():
                if again.verdict in ("right", "wrong", "approximate"):
                    judged[number] = replace(judged[number], verdict=again.verdict, error=again.error)
    return list(judged.values())


def _beside(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return a point off the kink at this one."""
    return moved_values(values, range(len(values)), generator, 1e-3)


def _without_zeros(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return a point where no leaf has an element that is zero: a gate that is closed at first has opened."""
    return [torch.where(v == 0, (rms(v) or 0.1) * gaussian_like(v, generator), v) for v in values]


@dataclass(slots=True, eq=False)
class _Probe:
    """What is kept of one application at the point."""

    application: Application
    call: FunctionCall
    inputs: dict[int, tuple[Tensor, Tensor | None]]  # x0 and g by position of the argument
    hidden: dict[
        int, tuple[Tensor, Tensor]
    ]  # x0 and g by index of the leaf, of leaves that are not among the arguments
    outputs: dict[int, tuple[Tensor, Tensor]]  # y0 and u by number of the output

    def noise(self, epsilon: float) -> float:
        """Return the rounding of psi, absolute."""
        pairs = [*self.outputs.values(), *self.inputs.values(), *self.hidden.values()]
        return 8 * epsilon * math.sqrt(sum(norm(x.detach() * w) ** 2 for x, w in pairs if w is not None))


@dataclass(frozen=True, slots=True)
class _Seen:
    """One application beside the point: psi, its two halves, and how far the inputs moved."""

    psi: float
    halves: float
    moved: tuple[float, ...]


class _Sweep:
    """All wanted applications at one point and along one direction."""

    def __init__(
        self,
        runner: ModelRunner,
        wanted: list[Application],
        values: list[Tensor],
        generator: torch.Generator,
        epsilon: float,
    ) -> None:
        self.runner, self.generator, self.epsilon = runner, generator, epsilon
        self.wanted = {application.number: application for application in wanted}
        self.probes: dict[int, _Probe] = {}
        self.pulled: dict[int, tuple[tuple[float, ...], float]] = {}
        self.now: dict[int, _Seen] = {}
        self.runs: dict[float, dict[int, _Seen]] = {}
        self._memory: dict[int, list[str]] = {}
        self._running: tuple[FunctionCall, tuple[Any, ...]] | None = None
        self.point = self._differentiate_all(values)
        values = self.point.values
        site = Site(self.point, "here", generator, list(map(natural_scale, values)), epsilon, [])
        sample = Sample({}, {}, [None] * len(values), [0.0] * len(values), {})
        indices = [i for i, value in enumerate(values) if value.numel()]
        self.phi = self.point.along(site.direction(indices, sample, equal_lengths=True), sample)

    def judge(self) -> dict[int, Judged]:
        """Return a verdict on each application that could be differentiated here."""
        with observed(self.runner, self):
            return {number: self._judged(probe) for number, probe in self.probes.items()}

    # ------------------------------------------------------------------ at the point

    def _differentiate_all(self, values: list[Tensor]) -> Point:
        """Return the point, with a probe of each application that can be differentiated there."""
        with observed(self.runner, self):
            return Point(self.runner, values)

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        if self.runner.watch.is_replaying:
            self._pull(number, function, args)
            return
        application = self.wanted.get(number)
        if application is None or application.function is not function or not torch.is_grad_enabled():
            return
        # The user's Function is called once more than its model calls it, and may raise.
        with refusals_ignored(), preserve_generators(), keeps_what_it_saves():
            self._differentiate(application, apply, args)

    def _differentiate(self, application: Application, apply: Apply, args: tuple[Any, ...]) -> None:
        """Differentiate one application: its own node alone, by ``backward`` as training does."""
        fresh = {i: arg.detach().requires_grad_() for i, arg in enumerate(args) if _is_inner(arg)}
        call = FunctionCall(application.function, copied_arguments(args), application.place, application.module)
        # Clones: a Function that changes an input in place (mark_dirty) must not be given a leaf.
        outputs = _used(application, apply(*[fresh[i].clone() if i in fresh else arg for i, arg in enumerate(args)]))
        if not outputs:
            return
        cotangents = {k: gaussian_like(y, self.generator) / (rms(y.detach()) or 1.0) for k, y in outputs.items()}
        hidden = self._leaf_gradients(outputs, cotangents)
        inputs = {i: (call.args[i], dense(leaf.grad)) for i, leaf in fresh.items()}
        kept = {k: (y.detach().clone(), cotangents[k]) for k, y in outputs.items()}
        self.probes[application.number] = _Probe(application, call, inputs, hidden, kept)

    def _leaf_gradients(
        self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Run ``backward`` and return value and gradient of each leaf that gets one; put their ``.grad`` back."""
        leaves = self.runner.leaves
        saved = [(tensor, tensor.grad) for leaf in leaves for tensor in (leaf.sharing or (leaf.tensor,))]
        for tensor, _ in saved:
            tensor.grad = None
        try:
            torch.autograd.backward(list(outputs.values()), [cotangents[k].clone() for k in outputs])
            gradients = {i: leaf.take_gradient() for i, leaf in enumerate(leaves)}
            return {i: (leaves[i].tensor.detach().clone(), g) for i, g in gradients.items() if g is not None}
        finally:
            for tensor, gradient in saved:
                tensor.grad = gradient

    # ------------------------------------------------------------------ beside it

    def _pull(self, number: int, function: FunctionClass, args: tuple[Any, ...]) -> None:
        """Note how far each input moved, and <g, x - x0>, before the Function can write to its inputs."""
        self.pulled.pop(number, None)
        probe = self.probes.get(number)
        if probe is None or probe.application.function is not function:
            return
        moved, pulled = [], 0.0
        for i, (x0, g) in probe.inputs.items():
            x = args[i] if i < len(args) else None
            if not isinstance(x, Tensor) or x.shape != x0.shape:
                return  # another branch than at the point
            change = x.detach().to(x0.dtype) - x0.detach()
            moved.append(norm(change))
            pulled += dot(g, change) if g is not None else 0.0
        for i, (x0, g) in probe.hidden.items():
            pulled += dot(g, self.runner.leaves[i].tensor.detach() - x0)
        self.pulled[number] = tuple(moved), pulled

    def after(self, number: int, result: Any) -> None:
        """Note <u, y - y0>, and with it psi."""
        if not self.runner.watch.is_replaying or number not in self.pulled:
            return
        moved, pulled = self.pulled.pop(number)
        values, pushed = numbered(result), 0.0
        for k, (y0, u) in self.probes[number].outputs.items():
            if k not in values or values[k].shape != y0.shape:
                return
            pushed += dot(u, values[k].detach().to(y0.dtype) - y0)
        self.now[number] = _Seen(pushed - pulled, max(abs(pushed), abs(pulled)), moved)

    def _at(self, t: float) -> dict[int, _Seen]:
        if t not in self.runs:
            self.now = {}
            finite = not math.isnan(self.phi(t))
            self.runs[t] = self.now if finite else {}
        return self.runs[t]

    # ------------------------------------------------------------------ the verdict

    def _judged(self, probe: _Probe) -> Judged:
        """Return the verdict from four runs if those resolve it, else from the ladder."""
        if self.runner.watch.linearised(probe.application.function):  # a linear map replaces it beside the point
            return Judged(probe.application, probe.call, "unresolved")
        far, near = (self._at(t).get(probe.application.number) for t in (_STEP, _STEP / 2))
        size = 2 * near.halves / _STEP if near is not None else 0.0
        verdict, slope = self._verdict(probe, size)
        if verdict == "right" and _is_still(far, near):
            verdict = "unmoved"
        if verdict != "wrong":
            return Judged(probe.application, probe.call, verdict, kinked=verdict == "unresolved" and slope.kinked)
        error = abs(slope.derivative) / size if size else 1.0
        return Judged(probe.application, probe.call, "approximate" if error < _APPROXIMATE else "wrong", error)

    def _verdict(self, probe: _Probe, size: float) -> tuple[Verdict, Slope]:
        """Return the verdict on one application and the slope of its psi, of which ``size`` is that of the halves."""
        number, noise = probe.application.number, probe.noise(self.epsilon)

        def psi(t: float) -> float:
            if t == 0:
                return 0.0
            seen = self._at(t).get(number)
            return seen.psi if seen is not None else math.nan

        def is_off(slope: Slope) -> bool:
            return abs(slope.derivative) > 10 * slope.error

        slope = slope_at_zero(psi, noise, size, self.epsilon, largest_step=_STEP, single_step=True)
        if slope.error <= _RESOLVED * size and not is_off(slope):
            return "right", slope
        slope = slope_at_zero(psi, noise, size, self.epsilon)
        if slope.resolved and is_off(slope):
            # Make sure, before anybody is called wrong.
            noise = max(noise, noise_floor(psi))
            slope = slope_at_zero(psi, noise, size, self.epsilon, to_the_end=True)
        if slope.kinked or not slope.resolved:
            return "unresolved", slope
        return "wrong" if slope.usable and is_off(slope) else "right", slope


class _SweepInPlace(_Sweep):
    """All wanted applications by their own nodes: what each receives and returns in one backward of the model."""

    def judge(self) -> dict[int, Judged]:
        """Return a verdict on each application, with what is unusual about the memory that it was handed."""
        judged = super().judge()
        return {number: replace(each, memory=tuple(self._memory[number])) for number, each in judged.items()}

    def _differentiate_all(self, values: list[Tensor]) -> Point:
        point = Point(self.runner, values)  # the leaves hold them from here on
        run_backward(self.runner, self, gaussian)
        return point

    def _differentiate(self, application: Application, apply: Apply, args: tuple[Any, ...]) -> None:
        call = FunctionCall(application.function, copied_arguments(args), application.place, application.module)
        self._running = call, args

    def after(self, number: int, result: Any) -> None:
        """Watch the node of an application at the point; beside it, note psi."""
        if self._running is None:
            super().after(number, result)
            return
        (call, args), self._running = self._running, None
        outputs = _used(self.wanted[number], result)
        nodes = {node_of(y) for y in outputs.values()}
        node = nodes.pop() if len(nodes) == 1 else None
        if node is not None and getattr(node, "_forward_cls", None) is call.function:
            self._memory[number] = _unusual_memory(call, args, outputs)
            self._watch(number, call, node, {k: y.detach().clone() for k, y in outputs.items()})

    def _watch(self, number: int, call: FunctionCall, node: Any, outputs: dict[int, Tensor]) -> None:
        """Note what arrives at a node and what it returns, one gradient for each tensor among the arguments."""
        arguments = {i: arg for i, arg in enumerate(call.args) if isinstance(arg, Tensor)}
        arrived: dict[int, Tensor] = {}
        leaves: list[Any] = []

        def before(cotangents: Sequence[Tensor | None]) -> None:
            arrived.clear()
            for k, u in enumerate(cotangents):
                if u is not None:
                    arrived[k] = u.detach().clone()
                    self._memory[number] += [f"its incoming gradient is {_LAYOUTS[each]}" for each in layout(u)]
            leaves[:] = self._gradients_of_leaves()

        def returned(gradients: Sequence[Tensor | None], _: Any) -> None:
            # A backward that the model itself runs is one for some of the arguments.
            is_inner = self.runner.watch.observer is not None
            reaches_others = leaves != self._gradients_of_leaves()  # leaves that are not among its arguments
            if is_inner or reaches_others or len(gradients) != len(arguments):
                return
            inputs = {
                i: (x.detach(), None if g is None else g.detach().to_dense().sum_to_size(x.shape).clone())
                for (i, x), g in zip(arguments.items(), gradients, strict=False)
                if x.requires_grad and x.layout == torch.strided
            }
            pairs = {k: (y, arrived[k]) for k, y in outputs.items() if k in arrived}
            self.probes[number] = _Probe(self.wanted[number], call, inputs, {}, pairs)

        node.register_prehook(before)
        node.register_hook(returned)

    def _gradients_of_leaves(self) -> list[tuple[int, int]]:
        tensors = [tensor for leaf in self.runner.leaves for tensor in (leaf.sharing or (leaf.tensor,))]
        return [(id(t.grad), t.grad._version if t.grad is not None else 0) for t in tensors]


def _used(application: Application, result: Any) -> dict[int, Tensor]:
    """Return the outputs of an application that get a cotangent, by number."""
    return {
        k: y
        for k, y in numbered(result).items()
        if y.requires_grad and y.layout == torch.strided and k in (application.outputs or {k})
    }


def _unusual_memory(call: FunctionCall, args: tuple[Any, ...], outputs: dict[int, Tensor]) -> list[str]:
    """Return what copies of these arguments do not have: strides of their own, and memory that several share."""
    inputs = {
        repr(argument_name(call, i)): arg
        for i, arg in enumerate(args)
        if isinstance(arg, Tensor) and arg.layout == torch.strided
    }
    strides = [f"{name} is {_LAYOUTS[each]}" for name, x in inputs.items() for each in layout(x)]
    return strides + _shared(inputs | {f"output {k}": y for k, y in outputs.items()})


def _shared(tensors: dict[str, Tensor]) -> list[str]:
    memory = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items() if tensor.numel()}
    pairs = [(one, other) for one, other in combinations(memory, 2) if memory[one] == memory[other]]
    return [f"{one} and {other} share memory" for one, other in pairs]


def _is_still(far: _Seen | None, near: _Seen | None) -> bool:
    """Tell inputs that do not move, or in second order only: a quarter at half the step, which is 0.3 at most."""
    return far is None or near is None or any(b <= 0.3 * a for a, b in zip(far.moved, near.moved, strict=True))


def _is_inner(arg: Any) -> bool:
    """Tell a differentiable argument that the model computed. A leaf is passed as it is: Functions close over it."""
    return isinstance(arg, Tensor) and arg.requires_grad and not arg.is_leaf and arg.layout == torch.strided
