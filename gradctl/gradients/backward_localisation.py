"""Which torch call or leaf module has a wrong backward: each is judged alone, at the inputs it gets in the model.

The model runs once. Before each top-level torch call the same call is judged on copies of its arguments, as a function
of those that ask for a gradient; then it is made for the model. No activation is kept for it, what comes after a wrong
call is judged on its own inputs and found right, and memory is that of one training forward and one call. Where no
call is wrong, leaf modules are judged in the same way: they may compute in compiled code that torch calls do not show.

Not seen: a gradient that is wrong though every part's is right (a saved tensor written to behind autograd's back, a
``saved_tensors_hooks`` around more than one module that loses precision).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from gradctl.numerics.judge import Judge
from gradctl.numerics.ladder import slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, is_float, norm
from gradctl.numerics.point import Direction, NoGradient
from gradctl.numerics.runner import Outputs
from gradctl.subject.frames import is_out_of_memory, user_location
from gradctl.subject.instance import Leaf
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.tree import leaves, map_leaves
from gradctl.tracing.graph import CallSite, modules_by_identity, node_before
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.recorder import Program
from gradctl.tracing.recording import Recording
from gradctl.tracing.tracer import REGISTER_HOOK

__all__ = ["Vote", "WrongBackward", "forward_mode_vote", "wrong_parts"]

# A step of 1e-3 has an error of about 1e-12 after one extrapolation where the function is tame, and 1e-13 of rounding.
_STEP = 1e-3
# Calls of one function at one line with one set of shapes: a loop of a thousand steps is judged in its first ones.
_ALIKE = 32
_PLAINLY = 1e-7

# Whose rule is broken: the VJP (forward mode agrees with finite differences), both, or nobody can say.
Vote = Literal["vjp", "both"] | None


@dataclass(frozen=True, slots=True, eq=False)
class WrongBackward:
    """A part of the program whose backward is not its derivative.

    Attributes:
        origin: which call or module, and where.
        vote: what forward mode says of it.
        sources: nodes from which autograd goes on with the wrong gradients, to those arguments.
    """

    origin: CallSite
    vote: Vote
    sources: tuple[Any, ...]


def wrong_parts(
    runner: ModelRunner, settings: dict[str, Any], is_over: Callable[[], bool] = lambda: False
) -> list[WrongBackward]:
    """Return the torch calls that are wrong alone at the present values of the leaves; if none is, the leaf modules.

    A call that applies custom Functions is passed over: those are judged by themselves.

    Args:
        runner: the model.
        settings: of each ``Judge``.
        is_over: whether to judge no further part.

    Raises:
        TimeoutError: it was over before a part was found wrong.
        Exception: whatever the user's model raises.
    """
    calls = _CallWatch(runner, settings, is_over)
    with runner.instance.preserve_leaves():
        runner.run(calls)
    if calls.found:
        return _once_each(calls.found)
    modules = _ModuleWatch(runner, settings, is_over)
    handle = register_module_forward_pre_hook(modules.before)  # a ScriptModule takes no hook of its own
    try:
        with runner.instance.preserve_leaves():
            runner.run(modules.program)
    finally:
        handle.remove()
    if is_over() and not modules.found:
        raise TimeoutError("no part was found wrong in the time that the search may take")
    return _once_each(modules.found)


class _Part:
    """One call as the oracle wants it: a function of the arguments that ask for a gradient."""

    extra = 0.0

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, seed: int) -> None:
        self.function, self.seed = function, seed
        self.recording = Recording()
        self._leaves: list[Leaf] = []
        self.originals: list[Tensor] = []
        self._known: dict[int, int] = {}
        self.arguments = map_leaves(self._copied, (tuple(args), dict(kwargs)))
        self.leaves: Sequence[Leaf] = self._leaves

    @property
    def writes(self) -> bool:
        """Whether a run may change a leaf: never, it is given clones."""
        return False

    def differentiate(self) -> Outputs:
        return self.run(Program(hooks_only=True))

    def record(self) -> Outputs:
        program = Program()
        outputs = self.run(program)
        self.recording = program.recording
        return outputs

    def beside(self) -> Outputs:
        return self.run(Program(self.recording))

    @contextmanager
    def promoted(self) -> Iterator[None]:
        """Return no context of its own: the model's run, in which it is judged, is promoted already."""
        yield

    def run(self, program: Program, tensors: Sequence[Tensor] | None = None) -> Outputs:
        """Return the float tensors that the call returns, and those among its arguments that it wrote to."""
        given = [leaf.tensor for leaf in self.leaves] if tensors is None else tensors
        with torch.enable_grad():
            clones = [tensor.clone() for tensor in given]  # it may write to them
        args, kwargs = map_leaves(lambda _, leaf: self._fresh(leaf, clones), self.arguments)
        handed = [value for _, value in leaves((args, kwargs)) if is_float(value)]
        versions = [value._version for value in handed]
        seed_generators(self.seed)
        with torch.enable_grad(), program:
            result = self.function(*args, **kwargs)
        named = {f"output.{path}": value for path, value in leaves(result) if is_float(value)}
        returned = {id(value) for value in named.values()}
        written = [(f"argument.{k}", value) for k, value in enumerate(handed) if value._version > versions[k]]
        return [*named.items(), *((name, value) for name, value in written if id(value) not in returned)]

    def push(self, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return J times the tangents by output name, in forward mode; raises where there is no rule for that."""
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [forward_ad.make_dual(p, v) for p, v in zip(primals, tangents, strict=True)]  # type: ignore[no-untyped-call]
            pushed = {
                name: forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
                for name, t in self.run(Program(hooks_only=True), duals)
            }
        return {name: tangent for name, tangent in pushed.items() if tangent is not None}

    def _copied(self, path: str, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if not isinstance(value, Tensor):
            return value
        if not (value.requires_grad and is_float(value)):
            return value.detach().clone()
        if id(value) not in self._known:
            self._known[id(value)] = len(self._leaves)
            self._leaves.append(Leaf(path, value.detach().clone().requires_grad_(), value.dtype))
            self.originals.append(value)
        return _Placeholder(self._known[id(value)])

    def _fresh(self, value: Any, clones: Sequence[Tensor]) -> Any:
        if isinstance(value, _Placeholder):
            return clones[value.index]
        if isinstance(value, torch.Generator):
            return value.clone_state()
        return value.clone() if isinstance(value, Tensor) else value


class _Placeholder:
    """Stands for a leaf among the copied arguments. No dataclass: the walk over arguments would enter it."""

    def __init__(self, index: int) -> None:
        self.index = index


class _CallWatch(Program):
    """Judge each top-level torch call before the program makes it."""

    def __init__(self, runner: ModelRunner, settings: dict[str, Any], is_over: Callable[[], bool]) -> None:
        super().__init__(hooks_only=True, modules=modules_by_identity(runner.instance.model))
        self.opens_checkpoints = True
        self.runner, self.settings, self.is_over = runner, settings, is_over
        self._right: Counter[Any] = Counter()
        self.found: list[WrongBackward] = []

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Judge one call, then make it."""
        if func not in REGISTER_HOOK and _is_judged(func, (args, kwargs)):
            kind = (func, user_location(), tuple(v.shape for _, v in leaves((args, kwargs)) if isinstance(v, Tensor)))
            if self._right[kind] < _ALIKE and not self.is_over():
                part = _Part(func, args, kwargs, self.runner.instance.subject.seed)
                culprit = _judged(part, self.runner, self.settings, lambda: self.call_site(func))
                self.found += [culprit] if culprit is not None else []
                self._right[kind] += culprit is None
        return super().call(func, args, kwargs)


class _ModuleWatch:
    """Judge each module without children before it runs, as a function of its inputs and its parameters.

    A ScriptModule is one part whatever is in it, and a function of its inputs alone: torch swaps no parameters there.
    """

    def __init__(self, runner: ModelRunner, settings: dict[str, Any], is_over: Callable[[], bool]) -> None:
        self.runner, self.settings, self.is_over = runner, settings, is_over
        self.paths = modules_by_identity(runner.instance.model)
        self.program = Program(hooks_only=True)
        self.program.opens_checkpoints = True
        self.found: list[WrongBackward] = []
        self._judging = False

    def before(self, module: nn.Module, args: Any) -> None:
        """Judge a module on its positional inputs."""
        is_scripted = isinstance(module, torch.jit.ScriptModule)
        if self._judging or self.is_over() or id(module) not in self.paths:
            return
        if not is_scripted and list(module.children()):
            return
        tensors = {} if is_scripted else {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if not _is_judged(module, (args, tensors)):
            return

        def call(*given: Any) -> Any:
            *inputs, state = given
            return torch.func.functional_call(module, state, tuple(inputs)) if state else module(*inputs)

        origin = CallSite(type(module).__name__, user_location(), self.paths[id(module)])
        part = _Part(call, (*args, tensors), {}, self.runner.instance.subject.seed)
        self._judging = True
        try:
            culprit = _judged(part, self.runner, self.settings, lambda: origin)
        finally:
            self._judging = False
        self.found += [culprit] if culprit is not None else []


def _is_judged(func: Any, arguments: Any) -> bool:
    """Tell a call that autograd differentiates: it has a float argument that asks for a gradient."""
    return (
        torch.is_grad_enabled()
        and getattr(func, "__name__", "") not in _NOT_JUDGED
        and any(isinstance(value, Tensor) and value.requires_grad and is_float(value) for _, value in leaves(arguments))
    )


# ``__set__`` assigns ``.data`` and ``.grad``; ``grad`` and ``backward`` take a graph apart that copies do not have.
_NOT_JUDGED = frozenset({"__set__", "backward", "grad"})


def _judged(
    part: _Part, runner: ModelRunner, settings: dict[str, Any], origin: Callable[[], CallSite]
) -> WrongBackward | None:
    """Return the culprit if this part alone is wrong; None also where it cannot be judged alone."""
    applied = runner.watch.applied
    with preserve_generators(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is):
        # Hooks of its own: those of a checkpoint around the call would run the checkpointed function again.
        try:
            if _agrees(part) or runner.watch.applied > applied:
                return None
            judge = Judge(part, **{**settings, "probes": 1, "sizes": False})
            suspects, _ = judge.screen(range(len(part.leaves)))
            judged = judge.settled(judge.each(suspects)[0])
            wrong = [i for i, each in judged.items() if each.verdict in ("wrong", "missing") and not each.only_here]
            if not wrong:
                return None
            vote = forward_mode_vote(judge, part.push)
        except NoGradient:
            return None
        except Exception as error:  # a call outside its model may refuse anything
            if is_out_of_memory(error):
                raise
            return None
    return WrongBackward(origin(), vote, tuple(node_before(part.originals[i]) for i in wrong))


def _agrees(part: _Part) -> bool:
    """Tell a part that is plainly right, or has no gradient: 4 forwards along one direction over all its arguments.

    Any doubt (a kink, a curvature too large for the step, an argument without gradient that has a slope) is left to a
    ``Judge``, which is ten times as dear.
    """
    generator = torch.Generator().manual_seed(part.seed)
    outputs = {name: t for name, t in part.differentiate() if t.requires_grad}
    if not outputs:
        return True
    cotangents = {name: gaussian_like(t, generator) for name, t in outputs.items()}
    found = torch.autograd.grad(
        list(outputs.values()), [leaf.tensor for leaf in part.leaves], list(cotangents.values()), allow_unused=True
    )
    norms = [0.0 if gradient is None else norm(gradient) for gradient in found]
    # As in the joint screen: each argument has an equal share of the slope, one without a gradient that of the loudest.
    parts = [
        gaussian_like(leaf.tensor, generator) / ((leaf.tensor.numel() or 1) ** 0.5 * (size or max(norms) or 1.0))
        for leaf, size in zip(part.leaves, norms, strict=True)
    ]
    length = sum(norm(v) ** 2 for v in parts) ** 0.5 or 1.0
    parts = [v / length for v in parts]
    part.record()

    def phi(t: float) -> float:
        with torch.enable_grad():
            moved = [leaf.tensor + t * v for leaf, v in zip(part.leaves, parts, strict=True)]
        values = dict(part.run(Program(part.recording), moved))
        return sum(dot(w, values[name].detach()) for name, w in cotangents.items())

    coarse = (phi(_STEP) - phi(-_STEP)) / (2 * _STEP)
    fine = (phi(_STEP / 2) - phi(-_STEP / 2)) / _STEP
    stated = sum(dot(g, v) for g, v in zip(found, parts, strict=True) if g is not None)
    typical = sum((size * norm(v)) ** 2 / max(v.numel(), 1) for size, v in zip(norms, parts, strict=True)) ** 0.5
    return bool(abs((4 * fine - coarse) / 3 - stated) <= _PLAINLY * typical)


def forward_mode_vote(judge: Judge, push: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Tensor]]) -> Vote:
    """Return whose rule is broken where reverse mode is known to be wrong; None where forward mode has no rule.

    Along one random direction v, <w, J v> from forward mode is held against the finite difference.

    Args:
        judge: of the part, at its point.
        push: J times tangents at primals, by output name.
    """
    point, sample = judge.point, judge.samples[0]
    tangents = [gaussian_like(value, judge.generator) for value in point.values]
    for i, mask in point.infinite.items():
        tangents[i] = torch.where(mask, 0, tangents[i])
    length = sum(norm(v) ** 2 for v in tangents) ** 0.5
    tangents = [v / length for v in tangents]
    try:
        pushed = push([value.clone() for value in point.values], tangents)
    except Exception as error:  # no rule, or a wrong one that raises
        if is_out_of_memory(error):
            raise
        return None
    products = [
        (w, torch.where(sample.finite[name], pushed[name], 0) if name in sample.finite else pushed[name])
        for name, w in sample.cotangents.items()
        if name in pushed
    ]
    stated = sum(dot(w, tangent) for w, tangent in products)
    weight = sum(norm(w) * norm(tangent) for w, tangent in products)
    slope = slope_at_zero(point.along(Direction(list(tangents), []), sample), judge.noise, weight, judge.epsilon)
    if not slope.usable:
        return None
    return "vjp" if abs(stated - slope.derivative) <= 10 * slope.error + 64 * judge.epsilon * weight else "both"


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _once_each(found: Sequence[WrongBackward]) -> list[WrongBackward]:
    """Return one culprit an origin: a call in a loop is one."""
    merged: dict[CallSite, WrongBackward] = {}
    for culprit in found:
        known = merged.get(culprit.origin)
        sources = culprit.sources if known is None else (*known.sources, *culprit.sources)
        merged[culprit.origin] = WrongBackward(culprit.origin, culprit.vote if known is None else known.vote, sources)
    return list(merged.values())
