"""Custom Functions judged where the model applies them: along the directions in which its leaves move their inputs.

At the point, a cotangent u is drawn for the outputs of an application, and its backward gives g = VJP(u). Beside it, at
theta + t v, the application has inputs x(t) and outputs y(t). The backward is right along x'(0) exactly if
psi(t) = <u, y(t)> - <g, x(t)> has no slope at 0. One run of the model beside the point serves all applications, and
only numbers are kept of it. What moves the inputs moves them as the model does: symmetric ones stay symmetric.

A Function is asked for a gradient of those outputs only that get a cotangent in the model's own backward.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradctl.numerics.ladder import noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, norm
from gradctl.numerics.point import Direction, Point, Sample, natural_scale, rms
from gradctl.subject.frames import is_out_of_memory, user_location
from gradctl.subject.seeding import preserve_generators
from gradctl.tracing.functions import FunctionCall, copied_arguments, is_users
from gradctl.tracing.graph import innermost_module, leaves_behind
from gradctl.tracing.linear_map import keeps_what_it_saves
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.tracer import Apply, FunctionClass, SourceLine

__all__ = ["Application", "Judged", "judge_applications", "sampled", "survey"]

# One level of the ladder: where both halves of psi are smooth it resolves 1e-9, and four runs are all that is needed.
_STEP = 3.07e-2 / 4
_RESOLVED = 1e-6
_APPROXIMATE = 1e-4
# Copies of arguments and outputs are kept for so many bytes of them at once; what does not fit takes another sweep.
_BYTES_AT_ONCE = 2**29

Verdict = Literal["right", "wrong", "approximate", "unresolved", "unmoved"]


@dataclass(slots=True, eq=False)
class Application:
    """One application of a custom Function, and what the model's own backward asks of it.

    Attributes:
        number: which application of the run it is.
        function: the class.
        group: what it shares with others that do the same: class, shapes and dtypes of tensors, other arguments.
        bytes: of the tensors among its arguments.
        place: file and line of the caller.
        module: path of the module that applies it; None outside any, "" for the model itself.
        inside: whether it is applied in a transform of torch.func, where what cotangents it gets is not seen.
        outputs: numbers of the outputs that get a cotangent.
        asked: what not every caller asks: a cotangent that is not contiguous (``expanded``, ``strided``) or that one
            output has and another has not (``undefined``), a backward that is itself differentiated
            (``second-order``), dual tensors (``forward-mode``).
        leaves: names of the leaves behind each argument, by position; filled in where ``survey`` is asked to.
    """

    number: int
    function: FunctionClass
    group: tuple[Any, ...]
    bytes: int
    place: SourceLine | None
    module: str | None
    inside: bool = False
    outputs: set[int] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    leaves: dict[int, set[str]] = field(default_factory=dict)

    @property
    def is_used(self) -> bool:
        """Whether a gradient passes it at all."""
        return self.inside or bool(self.outputs)


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The verdict on one application.

    Attributes:
        application: which.
        call: what it was given at the point.
        verdict: ``unmoved`` if the model's leaves do not move its inputs, so that nothing was judged.
        error: size of the disagreement relative to the derivative along this direction.
        kinked: whether the point is a kink of this application.
    """

    application: Application
    call: FunctionCall
    verdict: Verdict
    error: float = 0.0
    kinked: bool = False


# ---------------------------------------------------------------------- what is applied, and how it is used


def survey(runner: ModelRunner, behind: Collection[int] = ()) -> list[Application]:
    """Return the applications of custom Functions at the present values of the leaves, one backward run through them.

    The backward is that of ``sum``: what follows a Function decides how the cotangent lies that it gets.

    Args:
        runner: the model.
        behind: numbers of the applications whose leaves are asked for.
    """
    raised: dict[int, set[str]] = {}
    for cotangents in (_expanded, _gaussian):
        seen = _Survey(runner, behind)
        with runner.instance.preserve_leaves():
            with _observed(runner, seen):
                outputs = [t for _, t in runner.record() if t.requires_grad and t.layout == torch.strided]
            try:
                with runner.promoted():
                    torch.autograd.backward(outputs, [cotangents(t) for t in outputs])
                break
            except Exception as error:  # a backward that refuses an expanded cotangent: that it got one is seen
                if is_out_of_memory(error):
                    raise
                raised = {number: each.asked for number, each in seen.applications.items()}
            finally:
                for leaf in runner.leaves:
                    leaf.take_gradient()
    for number, asked in raised.items():
        if number in seen.applications:
            seen.applications[number].asked |= asked
    return list(seen.applications.values())


class _Survey:
    def __init__(self, runner: ModelRunner, behind: Collection[int]) -> None:
        self.runner, self.behind = runner, behind
        self.applications: dict[int, Application] = {}

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        if not is_users(function) or not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return
        self.applications[number] = Application(
            number,
            function,
            (function, *map(_kind, args)),
            sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, Tensor)),
            user_location(),
            innermost_module(self.runner.watch.modules),
            inside=inside,
            asked={"forward-mode"} if forward_ad._current_level >= 0 else set(),
        )
        if number in self.behind:
            self.applications[number].leaves = {
                k: self._behind(arg) for k, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad
            }

    def after(self, number: int, result: Any) -> None:
        if number in self.applications and not self.applications[number].inside:
            self._watch(self.applications[number], result)

    def _behind(self, arg: Tensor) -> set[str]:
        own = {leaf.name for leaf in self.runner.leaves if any(arg is t for t in (leaf.sharing or (leaf.tensor,)))}
        return own | leaves_behind([arg.grad_fn], self.runner.leaves)

    def _watch(self, application: Application, result: Any) -> None:
        """See what cotangents arrive, in the backward to come and in one that the program itself runs."""
        nodes: dict[Any, set[int]] = {}
        for k, y in _numbered(result).items():
            if y.requires_grad and y.grad_fn is not None:
                nodes.setdefault(y.grad_fn, set()).add(k)
        for node, numbers in nodes.items():

            def arrived(cotangents: Sequence[Tensor | None], numbers: set[int] = numbers) -> None:
                given = {k for k in numbers if k < len(cotangents) and cotangents[k] is not None}
                application.outputs |= given
                application.asked |= {"undefined"} if given and given != numbers else set()
                application.asked |= {"second-order"} if torch.is_grad_enabled() else set()
                for k in given:
                    application.asked |= _layout(cotangents[k])  # type: ignore[arg-type]  # one that is there

            node.register_prehook(arrived)


def _layout(cotangent: Tensor) -> set[str]:
    if cotangent.layout != torch.strided or cotangent.is_contiguous():
        return set()
    spread = [stride for size, stride in zip(cotangent.shape, cotangent.stride(), strict=True) if size > 1]
    return {"expanded" if 0 in spread else "strided"}


def _kind(arg: Any) -> Any:
    """Return what two calls with arguments of one kind share; numbers differ from call to call (a step, a rate)."""
    if isinstance(arg, Tensor):
        return tuple(arg.shape), arg.dtype, arg.layout, arg.requires_grad
    return arg if isinstance(arg, (bool, str, type(None))) else type(arg)


def sampled(applications: Iterable[Application], seed: int) -> list[Application]:
    """Return the first, the last and one other application of each group."""
    groups: dict[Any, list[Application]] = {}
    for application in applications:
        groups.setdefault(application.group, []).append(application)
    draw = random.Random(seed)  # which of many calls to look at
    chosen = []
    for group in groups.values():
        middle = draw.randrange(1, len(group) - 1) if len(group) > 2 else 0
        chosen += [group[k] for k in sorted({0, middle, len(group) - 1})]
    return sorted(chosen, key=lambda application: application.number)


# ---------------------------------------------------------------------- the sweep


def judge_applications(
    runner: ModelRunner, applications: Sequence[Application], seed: int, epsilon: float
) -> list[Judged]:
    """Return a verdict on each of the applications, made at the present values of the leaves.

    What is at a kink there is judged beside it; what the leaves do not move, where no parameter is zero.
    Leaves the runner recorded at another point.
    """
    origin = [leaf.tensor.detach().clone() for leaf in runner.leaves]
    generator = torch.Generator().manual_seed(seed + 2)
    judged = []
    try:
        for window in _windows(applications):
            judged += _judge_window(runner, window, origin, generator, epsilon)
    finally:
        with torch.no_grad():
            for leaf, value in zip(runner.leaves, origin, strict=True):
                leaf.tensor.copy_(value)
    return judged


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


def _judge_window(
    runner: ModelRunner,
    window: list[Application],
    origin: list[Tensor],
    generator: torch.Generator,
    epsilon: float,
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
                first = judged[number]
                if again.verdict in ("right", "wrong", "approximate"):
                    judged[number] = Judged(first.application, first.call, again.verdict, again.error, first.kinked)
    return list(judged.values())


def _beside(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return a point off the kink at this one."""
    return [
        value + torch.where(torch.isfinite(value), max(1e-3 * rms(value), 1e-4) * gaussian_like(value, generator), 0)
        for value in values
    ]


def _without_zeros(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return a point where no leaf has an element that is zero: a gate that is closed at first has opened."""
    return [
        torch.where(value == 0, (rms(value) or 0.1) * gaussian_like(value, generator), value)
        if value.numel()
        else value
        for value in values
    ]


@dataclass(slots=True, eq=False)
class _Probe:
    """What is kept of one application at the point.

    Attributes:
        inputs: x0 and g by position of the argument; g is None if backward gives none.
        hidden: x0 and g by index of the leaf, for leaves that get a gradient though they are no argument.
        outputs: y0 and u by number of the output.
        noise: the rounding of psi, absolute.
    """

    application: Application
    call: FunctionCall
    inputs: dict[int, tuple[Tensor, Tensor | None]]
    hidden: dict[int, tuple[Tensor, Tensor]]
    outputs: dict[int, tuple[Tensor, Tensor]]
    noise: float


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
        with _observed(runner, self):
            self.point = Point(runner, values)
        self.phi = self.point.along(self._direction(), Sample({}, {}, [], [], {}))

    def judge(self) -> dict[int, Judged]:
        """Return a verdict on each application that could be asked for a gradient here."""
        with _observed(self.runner, self):
            return {number: self._judged(probe) for number, probe in self.probes.items()}

    # ------------------------------------------------------------------ at the point

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        if self.runner.watch.is_replaying:
            self._pull(number, function, args)
            return
        application = self.wanted.get(number)
        if application is None or application.function is not function or not torch.is_grad_enabled():
            return
        try:
            with preserve_generators(), keeps_what_it_saves():
                self._ask(application, apply, args)
        except Exception as error:  # the user's Function, called once more than its model calls it, may raise
            if is_out_of_memory(error):
                raise

    def _ask(self, application: Application, apply: Apply, args: tuple[Any, ...]) -> None:
        """Ask one application for its gradient: its own node alone, by ``backward`` as training does."""
        runner = self.runner
        fresh = {i: arg.detach().requires_grad_() for i, arg in enumerate(args) if _is_inner(arg)}
        call = FunctionCall(application.function, copied_arguments(args), application.place, application.module)
        # Clones: a Function that changes an input in place (mark_dirty) must not be given a leaf.
        result = apply(*[fresh[i].clone() if i in fresh else arg for i, arg in enumerate(args)])
        outputs = {
            k: y
            for k, y in _numbered(result).items()
            if y.requires_grad and y.layout == torch.strided and k in (application.outputs or {k})
        }
        if not outputs:
            return
        cotangents = {k: gaussian_like(y, self.generator) / (rms(y.detach()) or 1.0) for k, y in outputs.items()}
        saved = [(tensor, tensor.grad) for leaf in runner.leaves for tensor in (leaf.sharing or (leaf.tensor,))]
        for tensor, _ in saved:
            tensor.grad = None
        try:
            torch.autograd.backward(list(outputs.values()), [cotangents[k].clone() for k in outputs])
            leaf_gradients = [leaf.take_gradient() for leaf in runner.leaves]
        finally:
            for tensor, gradient in saved:
                tensor.grad = gradient
        inputs: dict[int, tuple[Tensor, Tensor | None]] = {
            i: (call.args[i], _dense(leaf.grad)) for i, leaf in fresh.items()
        }
        hidden = {
            i: (runner.leaves[i].tensor.detach().clone(), gradient)
            for i, gradient in enumerate(leaf_gradients)
            if gradient is not None
        }
        kept = {k: (y.detach().clone(), cotangents[k]) for k, y in outputs.items()}
        pairs = [*kept.values(), *((x, g) for x, g in inputs.values() if g is not None), *hidden.values()]
        noise = 8 * self.epsilon * math.sqrt(sum(norm(x.detach() * w) ** 2 for x, w in pairs))
        self.probes[application.number] = _Probe(application, call, inputs, hidden, kept, noise)

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
        values, pushed = _numbered(result), 0.0
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
        number = probe.application.number

        def psi(t: float) -> float:
            if t == 0:
                return 0.0
            seen = self._at(t).get(number)
            return seen.psi if seen is not None else math.nan

        def verdict(word: Verdict, error: float = 0.0, *, kinked: bool = False) -> Judged:
            return Judged(probe.application, probe.call, word, error, kinked)

        if self.runner.watch.linearised(probe.application.function):  # a linear map stands for it beside the point
            return verdict("unresolved")
        far, near = self._at(_STEP).get(number), self._at(_STEP / 2).get(number)
        size = 2 * near.halves / _STEP if near is not None else 0.0
        level = _level(psi, probe.noise)
        if level is None or level[1] > _RESOLVED * size or abs(level[0]) > 10 * level[1]:
            slope = slope_at_zero(psi, probe.noise, size, self.epsilon)
            if slope.resolved and abs(slope.derivative) > 10 * slope.error:
                # Make sure, before anybody is called wrong.
                noise = max(probe.noise, noise_floor(psi))
                slope = slope_at_zero(psi, noise, size, self.epsilon, to_the_end=True)
            if slope.kinked or not slope.resolved:
                return verdict("unresolved", kinked=slope.kinked)
            if slope.usable and abs(slope.derivative) > 10 * slope.error:
                error = abs(slope.derivative) / size if size else 1.0
                return verdict("approximate" if error < _APPROXIMATE else "wrong", error)
        # Not at all, or in second order only: a quarter at half the step, which is 0.3 at most.
        still = far is None or near is None or any(b <= 0.3 * a for a, b in zip(far.moved, near.moved, strict=True))
        return verdict("unmoved" if still else "right")

    def _direction(self) -> Direction:
        """Return Gaussian parts of equal length in units of the leaves' natural scales, of unit norm together."""
        values = self.point.values
        count = sum(value.numel() > 0 for value in values)
        parts: list[Tensor | None] = []
        lengths = []
        for i, value in enumerate(values):
            length = natural_scale(value) / math.sqrt(count) if value.numel() else 0.0
            part = gaussian_like(value, self.generator)
            if i in self.point.infinite:
                part = torch.where(self.point.infinite[i], 0, part)
            parts.append(part.mul_(length / (norm(part) or 1.0)))
            lengths.append(length)
        return Direction(parts, lengths)


def _level(psi: Callable[[float], float], noise: float) -> tuple[float, float] | None:
    """Return the slope of ``psi``, which is 0 at 0, and an estimate of its error, from two central differences."""
    far, back, near, near_back = (psi(t) for t in (_STEP, -_STEP, _STEP / 2, -_STEP / 2))
    if not all(map(math.isfinite, (far, back, near, near_back))):
        return None
    central, half = (far - back) / (2 * _STEP), (near - near_back) / _STEP
    second, second_half = (far + back) / _STEP, 2 * (near + near_back) / _STEP
    slope = (4 * half - central) / 3
    return slope, abs(slope - half) + abs(second - 2 * second_half) / 2 + 2 * noise / _STEP


@contextmanager
def _observed(runner: ModelRunner, observer: Any) -> Iterator[None]:
    runner.watch.observer = observer
    try:
        yield
    finally:
        runner.watch.observer = None


def _expanded(like: Tensor) -> Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device).expand(like.shape)


def _gaussian(like: Tensor) -> Tensor:
    return gaussian_like(like, torch.Generator().manual_seed(0))


def _numbered(result: Any) -> dict[int, Tensor]:
    """Return the tensors that a Function gives by the number that its node gives them, which is their place."""
    results = result if isinstance(result, tuple) else (result,)
    return {k: y for k, y in enumerate(results) if isinstance(y, Tensor)}


def _is_inner(arg: Any) -> bool:
    """Tell a differentiable argument that the model computed. A leaf is passed as it is: Functions close over it."""
    return isinstance(arg, Tensor) and arg.requires_grad and not arg.is_leaf and arg.layout == torch.strided


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.layout != torch.strided else gradient
