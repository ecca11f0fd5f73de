"""Which torch call or leaf module has a wrong backward: each is judged alone, at the inputs it gets in the model.

The model runs once. Before each top-level torch call the same call is judged on copies of its arguments, as a function
of those that require a gradient; then it is made for the model. No activation is kept for it, what comes after a wrong
call is judged on its own inputs and found right, and memory is that of one training forward and one call. Where no
call is wrong, leaf modules are judged in the same way: they may compute in compiled code that torch calls do not show.

Not seen: a gradient that is wrong though every part's is right (a saved tensor written to without autograd's knowledge,
``saved_tensors_hooks`` around more than one module that lose precision).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from gradctl.gradients.part import Part, Vote, forward_mode_vote
from gradctl.numerics.judge import Judge
from gradctl.numerics.measures import is_float
from gradctl.numerics.runner import Outputs, refusals_ignored
from gradctl.subject.frames import user_location
from gradctl.subject.instance import Leaf
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.tree import leaves, map_leaves
from gradctl.tracing.graph import CallSite, modules_by_identity, node_before
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.recorder import Recorder
from gradctl.tracing.recording import Recording
from gradctl.tracing.tracer import REGISTER_HOOK, is_in_transform

# Calls of one function at one line with one set of shapes: a loop of a thousand steps is judged in its first ones.
_ALIKE = 32


@dataclass(frozen=True, slots=True, eq=False)
class WrongBackward:
    """A part of the program whose backward is not its derivative."""

    origin: CallSite
    vote: Vote
    sources: tuple[Any, ...]  # nodes from which autograd goes on with the wrong gradients


def find_wrong_parts(
    runner: ModelRunner, settings: dict[str, Any], is_over: Callable[[], bool] = lambda: False
) -> list[WrongBackward]:
    """Return the torch calls that are wrong alone at the present values of the leaves; if none is, the leaf modules.

    A call that applies custom Functions is passed over: those are judged by themselves.

    Raises:
        TimeoutError: it was over before a part was found wrong.
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


class _CallPart(Part):
    """One call as a function of the arguments that require a gradient."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, seed: int) -> None:
        self.function, self.seed = function, seed
        self.recording = Recording()
        self._leaves: list[Leaf] = []
        self.originals: list[Tensor] = []
        self._known: dict[int, int] = {}
        self.arguments = map_leaves(self._copied, (tuple(args), dict(kwargs)))
        self.leaves = self._leaves

    def differentiate(self) -> Outputs:
        return self.run(Recorder(hooks_only=True))

    def record(self) -> Outputs:
        program = Recorder()
        outputs = self.run(program)
        self.recording = program.recording
        return outputs

    def beside(self) -> Outputs:
        return self.run(Recorder(self.recording))

    def evaluate(self, tensors: Sequence[Tensor]) -> Outputs:
        with sdpa_kernel(SDPBackend.MATH):  # the only one with a rule for forward mode
            return self.run(Recorder(hooks_only=True), tensors)

    def run(self, program: Recorder, tensors: Sequence[Tensor] | None = None) -> Outputs:
        """Return the float tensors that the call returns, and those among its arguments that it wrote to."""
        given = [leaf.tensor for leaf in self.leaves] if tensors is None else tensors
        with torch.enable_grad():
            clones = list(map(torch.clone, given))  # it may write to them
        args, kwargs = map_leaves(lambda _, leaf: self._fresh(leaf, clones), self.arguments)
        handed = [(value, value._version) for _, value in leaves((args, kwargs)) if is_float(value)]
        seed_generators(self.seed)
        with torch.enable_grad(), program:
            result = self.function(*args, **kwargs)
        written = [(f"argument.{k}", value) for k, (value, before) in enumerate(handed) if value._version > before]
        named = [(f"output.{path}", value) for path, value in leaves(result) if is_float(value)]
        return list({id(value): (name, value) for name, value in (*written, *named)}.values())

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


class _CallWatch(Recorder):
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
                part = _CallPart(func, args, kwargs, self.runner.instance.subject.seed)
                wrong = _judge(part, self.runner, self.settings, lambda: self.call_site(func))
                self.found += [wrong] if wrong is not None else []
                self._right[kind] += wrong is None
        return super().call(func, args, kwargs)


class _ModuleWatch:
    """Judge each module without children before it runs, as a function of its inputs and its parameters.

    A ScriptModule is one part whatever is in it, and a function of its inputs alone: torch swaps no parameters there.
    """

    def __init__(self, runner: ModelRunner, settings: dict[str, Any], is_over: Callable[[], bool]) -> None:
        self.runner, self.settings, self.is_over = runner, settings, is_over
        self.paths = modules_by_identity(runner.instance.model)
        self.program = Recorder(hooks_only=True)
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
        part = _CallPart(call, (*args, tensors), {}, self.runner.instance.subject.seed)
        self._judging = True
        try:
            wrong = _judge(part, self.runner, self.settings, lambda: origin)
        finally:
            self._judging = False
        self.found += [wrong] if wrong is not None else []


def _is_judged(func: Any, arguments: Any) -> bool:
    """Tell a call outside a transform that autograd differentiates: a float argument requires a gradient."""
    return (
        torch.is_grad_enabled()
        and not is_in_transform()
        and getattr(func, "__name__", "") not in _NOT_JUDGED
        and any(isinstance(value, Tensor) and value.requires_grad and is_float(value) for _, value in leaves(arguments))
    )


# ``__set__`` assigns ``.data`` and ``.grad``; ``grad`` and ``backward`` take a graph apart that copies do not have.
_NOT_JUDGED = frozenset({"__set__", "backward", "grad"})


def _judge(
    part: _CallPart, runner: ModelRunner, settings: dict[str, Any], origin: Callable[[], CallSite]
) -> WrongBackward | None:
    """Return a part whose backward is wrong alone; None also if it cannot be judged alone."""
    applied = runner.watch.applied
    # Hooks of its own: those of a checkpoint around the call would run the checkpointed function again.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is)
    with refusals_ignored(), preserve_generators(), own_hooks:  # a call outside its model may refuse anything
        if part.is_plainly_right(part.seed) or runner.watch.applied > applied:
            return None
        judge = Judge(part, **{**settings, "probes": 1, "sizes": False})
        judged = judge.wrong(range(len(part.leaves)), is_settled=True)
        if wrong := [i for i, each in judged.items() if not each.only_here]:
            vote = forward_mode_vote(judge, part.push)
            return WrongBackward(origin(), vote, tuple(node_before(part.originals[i]) for i in wrong))
    return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _once_each(found: Sequence[WrongBackward]) -> list[WrongBackward]:
    """Return one part an origin: a call in a loop is one."""
    merged: dict[CallSite, WrongBackward] = {}
    for part in found:
        known = merged.get(part.origin)
        sources = part.sources if known is None else (*known.sources, *part.sources)
        merged[part.origin] = WrongBackward(part.origin, part.vote if known is None else known.vote, sources)
    return list(merged.values())
