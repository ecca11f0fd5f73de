"""The interventions that are tried on a difference: ordinary explanations first, cheap ones early."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gradctl.comparison.trials import ModelTrial
from gradctl.diagnosis.causes import Cause, Intervention, Search
from gradctl.inspection.model import hooks_on_modules, observe_call
from gradctl.subject.frames import user_location
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.tracing.semantics import ProgramEvents, QueryResult, StateQuery, Suppressed, watching
from gradctl.tracing.tracer import SourceLine

# Of several places, each alone is a run of the model; beyond this all are named together.
_MOST_PLACES = 8
_Kind = Literal["functions", "hooks", "no_grads", "detaches"]


def experiments(search: Search) -> Iterator[Intervention]:
    """Yield the interventions, each made on demand."""
    form = search.comparison.captured.form
    yield from _modes(form, search.reference.instance())
    yield from _seeds(form, search.reference.instance())
    seen = _seen(search.reference.instance())
    if seen is not None:
        kinds = _semantics(form, seen, search.reference.instance())
        yield from (_undoing([kind]) for kind in kinds)
        for size in range(2, len(kinds) + 1):
            yield from (_undoing(list(several)) for several in combinations(kinds, size))
        yield from _answers(form, seen, search)
    yield from _attributes(form, search.reference.instance())


def _seen(instance: Instance) -> ProgramEvents | None:
    """Return the events of one run, or None if the program rejects function modes."""
    seen = ProgramEvents()
    try:
        with torch.enable_grad():
            instance.run(watching(seen))
    except Exception:  # some programs reject function modes (torch.cond): skip the diagnosis
        return None
    return seen


# ------------------------------------------------------------------ the mode of the model


def _modes(form: str, instance: Instance) -> Iterator[Intervention]:
    """Return the model in its other mode: all of it, its BatchNorm only, its dropout only."""
    module = module_of(instance.model)
    if module is None:
        return
    training = module.training
    own, other = ("training", "evaluation") if training else ("evaluation", "training")
    for kind, matches in _MODE_DEPENDENT.items():
        names = [
            name or type(child).__name__
            for name, child in module.named_modules()
            if matches(child) and child.training == training
        ]
        if kind and not names:
            continue
        shown = f": {', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else ""
        yield Intervention(
            Cause(
                "GC209",
                f"{form} has {kind or 'the model'} in {other} mode, and eager is in {own} mode{shown}",
                "capture the model in the mode that it is used in: call eval() or train() before, or give --eval.",
                module=names[0] if len(names) == 1 else None,
            ),
            call=_in_mode(matches, training=not training),
        )


def _in_mode(matches: Callable[[nn.Module], bool], *, training: bool) -> Callable[[Instance], Callable[..., Any]]:
    def called(instance: Instance) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for child in instance.model.modules():
                if matches(child):
                    child.training = training
            return instance.model(*args, **kwargs)

        return call

    return called


_MODE_DEPENDENT: dict[str, Callable[[nn.Module], bool]] = {
    "BatchNorm": lambda child: isinstance(child, nn.modules.batchnorm._BatchNorm),
    "dropout": lambda child: isinstance(child, nn.modules.dropout._DropoutNd),
    "": lambda child: True,
}

# ------------------------------------------------------------------ random numbers


def generators_moved(instance: Instance) -> list[str]:
    """Return the global generators that a run draws from: ``torch``, ``python``, ``numpy``."""
    states: list[dict[str, Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        states.append(_generator_states())
        value = instance.model(*args, **kwargs)
        states.append(_generator_states())
        return value

    _call(instance, call)
    before, after = states
    return [name for name, state in before.items() if state != after[name]]


def _call(instance: Instance, call: Callable[..., Any]) -> None:
    """Call once, from the state and seed of a private copy."""
    instance.restore()
    args, kwargs = instance.inputs()
    with torch.enable_grad():
        instance.call(call, args, kwargs)
    instance.restore()


def _generator_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),
    }


def _seeds(form: str, instance: Instance) -> Iterator[Intervention]:
    """Return eager under the seed that forms are captured under: a number drawn then has been baked in."""
    moved = generators_moved(instance)
    for names in [[name for name in moved if name != "torch"], moved]:
        if names:
            yield Intervention(
                Cause(
                    "GC210",
                    f"{form} has baked in the random numbers of {' and '.join(names)} that were drawn while capturing",
                    "draw with torch (torch.rand, dropout), whose operators a graph keeps, or give it as an input.",
                    place_of_draw(instance, names),
                ),
                call=_seeded_as_captured(with_torch="torch" in names),
            )


def _seeded_as_captured(*, with_torch: bool) -> Callable[[Instance], Callable[..., Any]]:
    def called(instance: Instance) -> Callable[..., Any]:
        seed = instance.subject.seed

        def call(*args: Any, **kwargs: Any) -> Any:
            seed_generators(seed + 1)
            if not with_torch:
                torch.default_generator.manual_seed(seed)
            return instance.model(*args, **kwargs)

        return call

    return called


def place_of_draw(instance: Instance, names: list[str]) -> SourceLine | None:
    """Return the line that draws the first number of Python or numpy, or torch's first random operator."""
    if names == ["torch"]:
        found = [each.location for each in observe_call(instance, []) if each.kind == "random numbers"]
        return next(((at.file, at.line) for at in found if at is not None and at.file and at.line), None)
    places: list[SourceLine | None] = []

    def profile(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and isinstance(getattr(called, "__self__", None), random.Random | np.random.RandomState):
            places.append(user_location())

    def call(*args: Any, **kwargs: Any) -> Any:
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            return instance.model(*args, **kwargs)
        finally:
            sys.setprofile(before)

    _call(instance, call)
    return places[0] if places else None


# ------------------------------------------------------------------ gradient semantics


@dataclass(frozen=True, slots=True, eq=False)
class _Lost:
    """One part of the semantics that a form may drop."""

    kind: _Kind
    items: frozenset[Any]
    cause: Cause
    keep_hooks: bool
    alone: tuple[_Lost, ...] = ()


def _semantics(form: str, seen: ProgramEvents, instance: Instance) -> list[_Lost]:
    """Return the semantics of the program that a form may drop, each with its cause."""
    on_modules = [
        (hook.location.file, hook.location.line)
        for hook in hooks_on_modules(module_of(instance.subject.model))
        if hook.location is not None and hook.location.file and hook.location.line
    ]
    has_module_hooks = bool(list(hooks_on_modules(module_of(instance.subject.model))))
    hooks: list[SourceLine | None] = [*seen.hooks, *(on_modules if has_module_hooks else [])]
    found = [
        _lost("functions", list(seen.functions), lambda items: _function_dropped(form, seen, items)),
        _lost("no_grads", seen.no_grads, lambda items: _cut_dropped("GC201", form, "no_grad", items)),
        _lost("detaches", seen.detaches, lambda items: _cut_dropped("GC202", form, "detach", items)),
        _lost("hooks", hooks, lambda items: _hook_dropped(form, items), set(on_modules), has_module_hooks),
    ]
    return [each for each in found if each is not None]


def _lost(
    kind: _Kind,
    items: list[Any],
    cause: Callable[[list[Any]], Cause],
    on_modules: set[Any] = frozenset(),  # type: ignore[assignment]
    has_module_hooks: bool = False,
) -> _Lost | None:
    if not items and not has_module_hooks:
        return None
    alone = (
        tuple(_Lost(kind, frozenset([item]), cause([item]), item not in on_modules) for item in items)
        if 1 < len(items) <= _MOST_PLACES
        else ()
    )
    return _Lost(kind, frozenset(items), cause(items), not has_module_hooks, alone)


def _function_dropped(form: str, seen: ProgramEvents, functions: list[Any]) -> Cause:
    names = ", ".join(function.__name__ for function in functions[:3])
    return Cause(
        "GC204",
        f"{form} keeps the forward of {names} and drops its backward",
        "say the same with detach (y = x + (round(x) - x).detach()), or register the operation with "
        "torch.library.custom_op and register_autograd.",
        seen.functions[functions[0]],
    )


def _cut_dropped(code: str, form: str, name: str, places: list[SourceLine | None]) -> Cause:
    remedy = "use detach() on the value: it is an operator, and is kept by trace" if name == "no_grad" else ""
    return Cause(
        code,
        f"{form} drops {name} and lets the gradient through",
        f"{remedy or 'give the value as an input of its own, computed outside'}.",
        places[0],
    )


def _hook_dropped(form: str, places: list[SourceLine | None]) -> Cause:
    return Cause(
        "GC203",
        f"{form} drops the hook on a gradient",
        "a hook lives in eager only: write what it does to the gradient as an operation, or do it after backward.",
        places[0] if places else None,
    )


def _undoing(several: list[_Lost]) -> Intervention:
    """Return eager without any of these."""
    items: dict[str, Any] = {each.kind: each.items for each in several}
    undone = Suppressed(**items)
    causes = [each.cause for each in several]
    cause = causes[0]
    if len(causes) > 1:
        cause = replace(cause, words=", and ".join(each.words for each in causes))
    return Intervention(
        cause,
        context=lambda: watching(ProgramEvents(), undone),
        keep_hooks=all(each.keep_hooks for each in several),
        alone=tuple(_undoing([each]) for each in several[0].alone) if len(several) == 1 else (),
    )


# ------------------------------------------------------------------ what Python was told


def _answers(form: str, seen: ProgramEvents, search: Search) -> Iterator[Intervention]:
    """Yield eager with the Python values of the example, for each variation on which they differ."""
    for trial in search.reference.trials[1:]:
        elsewhere = _seen_on(trial, search)
        if elsewhere is None:
            continue
        differing = _differing(seen, elsewhere)
        if not differing:
            continue
        answers = [each for each in seen.answers if each.question in differing]
        alone = [
            _told(form, seen, elsewhere, [each for each in answers if each.question == question])
            for question in differing[:_MOST_PLACES]
        ]
        yield replace(_told(form, seen, elsewhere, answers), alone=tuple(alone) if len(differing) > 1 else ())


def _seen_on(trial: ModelTrial, search: Search) -> ProgramEvents | None:
    subject = trial.instance.subject
    return _seen(Instance(subject, input_mode=search.reference.input_mode, keep_hooks=True))


def _differing(seen: ProgramEvents, elsewhere: ProgramEvents) -> list[StateQuery]:
    """Return the queries with other results elsewhere, in the order of the calls."""
    here, there = _by_question(seen.answers), _by_question(elsewhere.answers)
    return [question for question, values in here.items() if there.get(question) != values]


def _by_question(answers: list[QueryResult]) -> dict[StateQuery, tuple[Any, ...]]:
    found: dict[StateQuery, tuple[Any, ...]] = {}
    for each in answers:
        found[each.question] = (*found.get(each.question, ()), each.value)
    return found


def _told(form: str, seen: ProgramEvents, elsewhere: ProgramEvents, answers: list[QueryResult]) -> Intervention:
    undone = Suppressed(answers=_by_question(answers))
    return Intervention(_baked(form, seen, elsewhere, answers[0]), context=lambda: watching(ProgramEvents(), undone))


def _baked(form: str, seen: ProgramEvents, elsewhere: ProgramEvents, first: QueryResult) -> Cause:
    """Return what was fixed at capture: sizes and strides by the query, a loop or a branch by the calls."""
    name, place = first.question
    if name in _OF_SHAPES:
        return Cause(
            "GC208",
            f"{form} has baked in {name} of a tensor, {first.value!r:.40} on the example",
            "write it without asking for the shape or strides, or make the input contiguous first.",
            place,
        )
    asked = [len(_by_question(each.answers).get(first.question, ())) for each in (seen, elsewhere)]
    # A loop queries once an iteration, or reads a number once and repeats the same calls; a branch queries once.
    again = name not in _TRUTHS and seen.calls != elsewhere.calls and set(seen.calls) == set(elsewhere.calls)
    if asked[0] != asked[1] or again:
        return Cause(
            "GC206",
            f"{form} has unrolled a loop as often as it ran on the example",
            "use torch.jit.script, or torch.while_loop, which keep a loop; or run it a fixed number of times.",
            place,
        )
    if name in _TRUTHS or seen.calls != elsewhere.calls:
        return Cause(
            "GC205",
            f"{form} has baked in the branch that the example takes",
            "write it with torch.where or torch.cond, or use torch.jit.script, which keeps a branch.",
            place,
        )
    return Cause(
        "GC207",
        f"{form} has baked in a Python number that {name} took out of a tensor, {first.value!r:.40} on the example",
        "keep the value a tensor: leave out item(), float() and int().",
        place,
    )


_OF_SHAPES = {
    "is_contiguous", "stride", "size", "shape", "numel", "nelement", "dim", "ndim", "ndimension", "__len__",
    "storage_offset", "data_ptr", "is_non_overlapping_and_dense",
}  # fmt: skip
_TRUTHS = {"__bool__", "is_nonzero", "equal", "allclose", "__contains__"}


# ------------------------------------------------------------------ what the model keeps in Python


def _attributes(form: str, instance: Instance) -> Iterator[Intervention]:
    """Yield eager with constant Python attributes, if a call changes some: a counter was fixed at capture."""
    module = module_of(instance.model)
    if module is None:
        return
    states: list[dict[tuple[str, str], Any]] = []

    def watched_call(*args: Any, **kwargs: Any) -> Any:
        states.append(_plain_attributes(module))
        value = instance.model(*args, **kwargs)
        states.append(_plain_attributes(module))
        return value

    _call(instance, watched_call)
    before, after = states
    moved = [key for key, value in before.items() if after.get(key, value) != value]
    if not moved:
        return
    owner, name = moved[0]

    def called(copy: Instance) -> Callable[..., Any]:
        children = dict(module_of(copy.model).named_modules())  # type: ignore[union-attr]

        def call(*args: Any, **kwargs: Any) -> Any:
            for path, attribute in moved:
                vars(children[path])[attribute] = before[path, attribute]
            return copy.model(*args, **kwargs)

        return call

    yield Intervention(
        Cause(
            "GC207",
            f"{form} has baked in the attribute {f'{owner}.' if owner else ''}{name}, a Python value that each call "
            f"changes ({before[owner, name]!r:.40} before the first, {after[owner, name]!r:.40} after it)",
            "keep it in a buffer (register_buffer), which a graph reads and writes.",
            module=owner or type(module).__name__,
        ),
        call=called,
    )


def _plain_attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, bool | int | float | str)
    }
