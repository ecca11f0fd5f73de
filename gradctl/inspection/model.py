"""``gradctl inspect``: the parts of a program, and what affects its gradients, before anything is captured.

One eager call is observed in four ways: autograd (parameters without gradient), top-level torch calls (cuts, hooks,
branches on data), custom Functions, and dispatched operators (random numbers, operators of other libraries). Code that
does not run in this call, on these inputs, is not observed.
"""

from __future__ import annotations

import types
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.core.errors import NothingToCheck
from gradctl.core.inspection import BufferRow, Inspection, Semantic, SemanticKind
from gradctl.core.names import buffer_name, input_name
from gradctl.forms.form import named_tensors
from gradctl.gradients.baseline import run_native
from gradctl.gradients.gradient_findings import location
from gradctl.inspection.file_contents import byte_count, element_count, parameter_rows, port, shape_and_dtype
from gradctl.numerics.measures import same_values
from gradctl.subject.frames import first_line, user_location
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.signature import module_of, optimized_inner
from gradctl.subject.subject import Subject
from gradctl.tracing.functions import FunctionWatch, is_torch_own
from gradctl.tracing.graph import leaves_behind
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.operators import OperatorMode
from gradctl.tracing.recording import BranchChanged, Cut
from gradctl.tracing.tracer import Apply, FunctionClass, SourceLine, Tracer

_BRANCH = "a branch or loop depends on the value of a tensor: trace keeps the side taken here, export rejects it"
_BY_HAND = "it has a custom backward: export and onnx drop it"
_FOREIGN = "it is not torch's own: its gradient, and what a file with it needs, is its library's"
_NUMBER = "a Python number is taken out of a tensor: trace bakes its value in"
# What torch registers itself; an operator of any other namespace is the user's, or another library's.
_TORCHS_OWN = ("aten", "prim", "prims", "quantized", "mkldnn", "onednn", "profiler", "inductor", "debugprims")
_STEPS = (1e-3, 1e-5)  # of a tensor's largest element: float32 resolves both, and few branches lie so near


def inspect(subject: Subject) -> Inspection:
    """Return parameters, buffers and gradient semantics of a program, from eager calls of a private copy.

    Raises:
        TargetError: the model cannot be run (GC111) or copied (GC112).
    """
    with preserve_generators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own, once a run
        notes: list[str] = []
        mode: InputMode = "leaf"
        try:
            native = run_native(subject)
            subject, mode = native.subject, native.input_mode
            native.kept.put_back()
        except NothingToCheck as error:
            notes.append(error.message)
        instance = Instance(subject, input_mode=mode, keep_hooks=True)
        module = module_of(instance.model)
        parameters, buffers = named_tensors(module)
        before = {name: tensor.detach().clone() for name, tensor in buffers.items()}
        with torch.enable_grad():
            outputs = instance.run()
        after = named_tensors(module)[1]
        without = None if notes else _without_gradient(instance, [t for _, t in outputs if t.requires_grad])
        args, kwargs = instance.inputs()
        return Inspection(
            subject=subject.target,
            source="program",
            inputs=tuple(port(input_name(name), value) for name, value in input_names(subject.model, args, kwargs)),
            outputs=tuple(port(name, tensor) for name, tensor in outputs),
            parameters=parameter_rows(parameters, without),
            buffers=tuple(_buffer_row(name, tensor, after.get(name)) for name, tensor in before.items()),
            elements=element_count(parameters.values()),
            bytes=byte_count([*parameters.values(), *buffers.values()]),
            semantics=(
                *observe_call(instance, notes),
                *hooks_on_modules(module_of(optimized_inner(subject.model))),
                *training_modes(module),
                *_cuts_and_hooks(subject, mode, without or frozenset(), notes),
            ),
            notes=tuple(notes),
        )


def _buffer_row(name: str, before: Tensor, after: Tensor | None) -> BufferRow:
    changes = after is None or not same_values(before, after)
    return BufferRow(name=buffer_name(name), **shape_and_dtype(before), changes=changes)


def _without_gradient(instance: Instance, outputs: list[Tensor]) -> frozenset[str]:
    """Return the names of the leaves that a backward through all outputs leaves without gradient."""
    torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
    return frozenset(
        name for leaf in instance.leaves if leaf.take_gradient() is None for name in (leaf.name, *leaf.tied)
    )


# ------------------------------------------------------------------ one call, watched


@dataclass(slots=True)
class _Seen:
    """The observations of one call, counted by kind and location."""

    counts: Counter[tuple[SemanticKind, str, str, SourceLine | None]] = field(default_factory=Counter)

    def note(self, kind: SemanticKind, name: str, message: str) -> None:
        """Count one occurrence at the user's line that is running."""
        self.counts[kind, name, message, user_location()] += 1

    def semantics(self) -> Iterator[Semantic]:
        """Yield the observations in order."""
        for (kind, name, message, place), count in self.counts.items():
            yield Semantic(kind=kind, name=name, message=message, count=count, location=location(place))


class _ProgramTracer(Tracer):
    """Notes the custom Functions that are applied, and where Python asks for the value of a tensor."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function."""
        if not is_torch_own(function):
            self.seen.note("custom function", function.__name__, _BY_HAND)
        return apply(*args)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make one call, and note it if its result is a Python value."""
        name = getattr(func, "__name__", "")
        if name in _INTO_PYTHON:
            self.seen.note("control flow", name.strip("_"), _INTO_PYTHON[name])
        return func(*args, **kwargs)


_INTO_PYTHON = {
    **dict.fromkeys(("__bool__", "is_nonzero", "equal", "allclose"), _BRANCH),
    **dict.fromkeys(("item", "tolist", "__int__", "__float__", "__index__"), _NUMBER),
}


class _Operators(OperatorMode):
    """Notes operators that generate random numbers, and operators of other libraries."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call, and note it if it is of these kinds."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            return self._random(func, args, kwargs)
        if getattr(func, "namespace", "aten") not in _TORCHS_OWN:
            self.seen.note("custom operator", f"{func.namespace}::{func.overloadpacket.__name__}", _FOREIGN)
        return func(*args, **kwargs)

    def _random(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call that may use random numbers: attention without dropout has the tag, and uses none."""
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        is_elsewhere = isinstance(result, Tensor) and result.device.type != "cpu"
        if kwargs.get("generator") is not None or is_elsewhere or not torch.equal(before, torch.get_rng_state()):
            self.seen.note("random numbers", func.overloadpacket.__name__, "forms may draw other numbers than eager")
        return result


def observe_call(instance: Instance, notes: list[str]) -> list[Semantic]:
    """Return the custom Functions, branches, random numbers and foreign operators of one call."""
    seen = _Seen()
    try:
        tracer = _ProgramTracer(seen)
        with torch.enable_grad(), tracer.functions(), _Operators(seen):
            instance.run(tracer)
    except Exception as error:  # it ran before: some programs (torch.cond, flex_attention) reject function modes
        notes.append(f"the program refuses to be watched, and what follows is not all: {first_line(error)}.")
    return list(seen.semantics())


# ------------------------------------------------------------------ cuts and hooks


def _cuts_and_hooks(subject: Subject, mode: InputMode, without: frozenset[str], notes: list[str]) -> list[Semantic]:
    """Return the cuts whose value depends on a leaf, and the tensor hooks, of one call."""
    runner = ModelRunner(Instance(subject, input_mode=mode), None, FunctionWatch())  # without hooks of modules
    runner.record()
    message = "a hook on the gradient of a tensor: trace and export drop it"
    found = [
        Semantic(kind="hook", name="register_hook", message=message, count=count, location=location(place))
        for place, count in Counter(runner.recording.hooks).items()
    ]
    cuts = [cut for cut in runner.recording.cuts.values() if cut.place is not None]
    if cuts and not _see_what_moves(runner):
        notes.append("close to these inputs the program takes another branch: detached constants are listed too.")
        return [*found, *_cuts(cuts, runner, without)]
    return [*found, *_cuts([cut for cut in cuts if cut.moves], runner, without)]


def _see_what_moves(runner: ModelRunner) -> bool:
    """Run near the point, so that each cut records if its value depends on a leaf; False if a branch changes."""
    generator = torch.Generator().manual_seed(0)
    for step in _STEPS:
        with torch.no_grad():
            for leaf in runner.leaves:
                if leaf.tensor.numel():
                    noise = torch.randn(leaf.tensor.shape, generator=generator, dtype=torch.float64)
                    size = step * max(float(leaf.tensor.abs().max()), 1e-3)
                    leaf.tensor.add_((size * noise).to(leaf.tensor.device, leaf.tensor.dtype))
        try:
            runner.beside()
        except BranchChanged:
            continue
        return True
    return False


def _cuts(cuts: list[Cut], runner: ModelRunner, without: frozenset[str]) -> Iterator[Semantic]:
    by_place: dict[tuple[str, SourceLine | None], list[Cut]] = {}
    for cut in cuts:
        by_place.setdefault((_call_name(cut.func), cut.place), []).append(cut)
    for (name, place), same in by_place.items():
        reached = {leaf for cut in same for leaf in leaves_behind(cut.sources, runner.leaves)}
        lost = tuple(sorted(reached & without))
        said = f", and leaves {', '.join(lost)} without gradient" if lost else ""
        message = f"autograd treats its value as a constant{said}"
        yield Semantic(kind="cut", name=name, message=message, count=len(same), tensors=lost, location=location(place))


def _call_name(func: Any) -> str:
    """Return ``detach``, or ``data`` for the property that is read."""
    name = getattr(func, "__name__", type(func).__name__)
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


def hooks_on_modules(module: nn.Module | None) -> Iterator[Semantic]:
    """Yield the backward hooks of modules and parameters, each with the line of its code."""
    if module is None:
        return
    for name, child in module.named_modules():
        for hook in [*child._backward_hooks.values(), *child._backward_pre_hooks.values()]:
            yield _hook(name or type(child).__name__, hook)
    for name, parameter in module.named_parameters():
        after = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        for hook in [*(parameter._backward_hooks or {}).values(), *after.values()]:
            yield _hook(f"param:{name}", hook)


def _hook(where: str, hook: Any) -> Semantic:
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    place = (code.co_filename, code.co_firstlineno) if isinstance(code, types.CodeType) else None
    message = "a hook on gradients: what it changes is no derivative, and static forms drop it"
    return Semantic(kind="hook", name=where, message=message, location=location(place))


def training_modes(module: nn.Module | None) -> Iterator[Semantic]:
    """Yield the modules in training mode that compute something else in evaluation mode."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, child in module.named_modules() if module is not None else ():
        kind, does = type(child).__name__, _in_training(child)
        if child.training and does:
            found.setdefault((kind, does), []).append(name or kind)
    for (kind, does), modules in found.items():
        message = f"in training mode it {does}: {', '.join(modules[:4])}" + (" …" if len(modules) > 4 else "")
        yield Semantic(kind="training mode", name=kind, message=message, count=len(modules), tensors=tuple(modules))


def _in_training(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "uses the statistics of the batch and changes its buffers"
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p
    return "draws a mask in each call" if is_dropout else ""
