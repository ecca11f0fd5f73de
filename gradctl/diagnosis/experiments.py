"""The interventions that are tried on a difference: ordinary explanations first, cheap ones early."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradctl.core.findings import Finding, Location, note
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
_KEEP_ONE_BRANCH = ("trace",)  # export refuses a branch on data, script keeps both, compile captures both
_Kind = Literal["functions", "hooks", "no_grads", "detaches"]
_Layers = type[nn.Module]
_State = TypeVar("_State", bound=dict[Any, Any])


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
            yield from map(_undoing, combinations(kinds, size))
        yield from _answers(form, seen, search)
    yield from _attributes(form, search.reference.instance())


def branch_notes(search: Search) -> list[Finding]:
    """Return a note for each line where the program branches on data, if the form keeps only the branch it captured."""
    form = search.comparison.captured.form
    seen = _seen(search.reference.instance()) if form in _KEEP_ONE_BRANCH else None
    tests = [each.question[1] for each in seen.answers if each.question[0] in _TRUTHS] if seen is not None else []
    message = f"the program branches on data here: {form} always takes the branch of the example."
    hint = "write it with torch.where or torch.cond, or use torch.jit.script, which keeps a branch."
    places = [*dict.fromkeys(filter(None, tests))][:_MOST_PLACES]
    return [note("GC205", message, hint, location=Location(file=file, line=line)) for file, line in places]


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
    """Yield the model in its other mode: all of it, its BatchNorm only, its dropout only."""
    module = module_of(instance.model)
    if module is None:
        return
    found = []
    for kind, layers in _MODE_DEPENDENT.items():
        matching = [(name, child) for name, child in module.named_modules() if isinstance(child, layers)]
        names = [name or type(child).__name__ for name, child in matching if child.training == module.training]
        if names or kind == _ALL:
            found.append(_in_other_mode(form, kind, names, module.training))
    whole, *parts = found
    # The whole comes first: one cause for all tensors, which is a part of the model if that explains them all.
    yield replace(whole, alone=tuple(parts))
    yield from parts


def _in_other_mode(form: str, kind: str, names: list[str], training: bool) -> Intervention:
    own, other = ("training", "evaluation") if training else ("evaluation", "training")
    shown = f": {few(names, 4)}" if names else ""
    return Intervention(
        Cause(
            "GC209",
            f"{form} has {kind} in {other} mode, and eager is in {own} mode{shown}",
            "capture the model in the mode that it is used in: call eval() or train() before, or add --eval.",
            module=names[0] if len(names) == 1 else None,
        ),
        before=partial(_set_mode, layers=_MODE_DEPENDENT[kind], training=not training),
    )


def _set_mode(instance: Instance, *, layers: _Layers, training: bool) -> None:
    for child in instance.model.modules():
        if isinstance(child, layers):
            child.training = training


def few(names: Collection[str], most: int) -> str:
    """Return the first names for a message."""
    return ", ".join(list(names)[:most]) + (" …" if len(names) > most else "")


_ALL = "the model"
_MODE_DEPENDENT: dict[str, _Layers] = {
    _ALL: nn.Module,
    "BatchNorm": nn.modules.batchnorm._BatchNorm,
    "dropout": nn.modules.dropout._DropoutNd,
}

# ------------------------------------------------------------------ random numbers


def generators_moved(instance: Instance) -> list[str]:
    """Return the global generators that a run uses: ``torch``, ``python``, ``numpy``."""
    before, after = _around_a_call(instance, _generator_states)
    return [name for name, state in before.items() if state != after[name]]


def call_once(instance: Instance, call: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the outputs of one call from the state and seed of a private copy."""
    instance.restore()
    args, kwargs = instance.inputs()
    with torch.enable_grad():
        outputs = dict(instance.call(call, args, kwargs))
    instance.restore()
    return outputs


def _around_a_call(instance: Instance, state: Callable[[], _State]) -> tuple[_State, _State]:
    """Return a state as it is before a call of the model, and after it."""
    states: list[_State] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        states.append(state())
        value = instance.model(*args, **kwargs)
        states.append(state())
        return value

    call_once(instance, call)
    return states[0], states[1]


def _generator_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),
    }


def _seeds(form: str, instance: Instance) -> Iterator[Intervention]:
    """Yield eager under the seed that forms are captured under: a random number of the capture became a constant."""
    moved = generators_moved(instance)
    for names in [[name for name in moved if name != "torch"], moved]:
        if names:
            yield Intervention(
                Cause(
                    "GC210",
                    f"{form} contains the random numbers of {' and '.join(names)} that were drawn at capture",
                    "draw with torch (torch.rand, dropout), whose operators a graph keeps, or pass it as an input.",
                    place_of_draw(instance, names),
                ),
                before=partial(_seed_as_captured, with_torch="torch" in names),
            )


def _seed_as_captured(instance: Instance, *, with_torch: bool) -> None:
    seed_generators(instance.subject.seed + 1)
    if not with_torch:
        torch.default_generator.manual_seed(instance.subject.seed)


def place_of_draw(instance: Instance, names: list[str]) -> SourceLine | None:
    """Return the line of the first random number of Python or NumPy, or of torch's first random operator."""
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

    call_once(instance, call)
    return places[0] if places else None


# ------------------------------------------------------------------ gradient semantics


@dataclass(frozen=True, slots=True, eq=False)
class _Lost:
    """One part of the semantics that a form may drop.

    Attributes:
        kind: of events.
        items: the Functions, or the places.
        cause: the cause for some of the items.
        on_modules: the items that are hooks on modules.
        keep_hooks: whether the model has no hooks on modules.
    """

    kind: _Kind
    items: list[Any]
    cause: Callable[[list[Any]], Cause]
    on_modules: frozenset[SourceLine] = frozenset()
    keep_hooks: bool = True

    def alone(self) -> list[_Lost]:
        """Return each item alone, if there are several."""
        if not 1 < len(self.items) <= _MOST_PLACES:
            return []
        return [replace(self, items=[item], keep_hooks=item not in self.on_modules) for item in self.items]


def _semantics(form: str, seen: ProgramEvents, instance: Instance) -> list[_Lost]:
    """Return the semantics of the program that a form may drop, each with its cause."""
    module_hooks = list(hooks_on_modules(module_of(instance.subject.model)))
    at = [hook.location for hook in module_hooks if hook.location is not None]
    on_modules = [(each.file, each.line) for each in at if each.file and each.line]
    found = [
        _Lost("functions", list(seen.functions), partial(_function_dropped, form, seen)),
        _Lost("no_grads", seen.no_grads, partial(_cut_dropped, "GC201", form, "no_grad")),
        _Lost("detaches", seen.detaches, partial(_cut_dropped, "GC202", form, "detach")),
        _Lost(
            "hooks", [*seen.hooks, *on_modules], partial(_hook_dropped, form), frozenset(on_modules), not module_hooks
        ),
    ]
    return [each for each in found if each.items or not each.keep_hooks]


def _function_dropped(form: str, seen: ProgramEvents, functions: list[Any]) -> Cause:
    names = ", ".join(function.__name__ for function in functions[:3])
    return Cause(
        "GC204",
        f"{form} keeps the forward of {names} and drops its backward",
        "write the same gradient with detach (y = x + (round(x) - x).detach()), or register the operation with "
        "torch.library.custom_op and register_autograd.",
        seen.functions[functions[0]],
    )


def _cut_dropped(code: str, form: str, name: str, places: list[SourceLine | None]) -> Cause:
    remedy = "use detach() on the value: it is an operator, and is kept by trace" if name == "no_grad" else ""
    return Cause(
        code,
        f"{form} drops {name} and lets the gradient through",
        f"{remedy or 'compute the value outside and pass it as an input'}.",
        places[0],
    )


def _hook_dropped(form: str, places: list[SourceLine | None]) -> Cause:
    return Cause(
        "GC203",
        f"{form} drops the hook on a gradient",
        "a graph does not contain hooks: write the hook as an operation, or apply it after backward.",
        places[0] if places else None,
    )


def _undoing(several: Sequence[_Lost]) -> Intervention:
    """Return eager without any of these."""
    items: dict[str, Any] = {each.kind: frozenset(each.items) for each in several}
    undone = Suppressed(**items)
    causes = [each.cause(each.items) for each in several]
    return Intervention(
        replace(causes[0], words=", and ".join(each.words for each in causes)),
        context=lambda: watching(ProgramEvents(), undone),
        keep_hooks=all(each.keep_hooks for each in several),
        alone=tuple(_undoing([each]) for each in several[0].alone()) if len(several) == 1 else (),
    )


# ------------------------------------------------------------------ results of queries


def _answers(form: str, seen: ProgramEvents, search: Search) -> Iterator[Intervention]:
    """Yield eager with the Python values of the example, for each variation on which they differ."""
    for trial in search.reference.trials[1:]:
        instance = Instance(trial.instance.subject, input_mode=search.reference.input_mode, keep_hooks=True)
        elsewhere = _seen(instance)
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
    """Return the cause for a value fixed at capture: sizes and strides by the query, others by the calls."""
    name, place = first.question
    if name in _OF_SHAPES:
        return Cause(
            "GC208",
            f"{form} has fixed at capture the result of {name} of a tensor, {first.value!r:.40} on the example",
            "do not use the shape or strides in Python, or make the input contiguous first.",
            place,
        )
    asked = [len(_by_question(each.answers).get(first.question, ())) for each in (seen, elsewhere)]
    # A loop queries once an iteration, or reads a number once and repeats the same calls; a branch queries once.
    again = name not in _TRUTHS and seen.calls != elsewhere.calls and set(seen.calls) == set(elsewhere.calls)
    if asked[0] != asked[1] or again:
        return Cause(
            "GC206",
            f"{form} repeats a loop as often as on the example",
            "use torch.jit.script, or torch.while_loop, which keep a loop; or run it a fixed number of times.",
            place,
        )
    if name in _TRUTHS or seen.calls != elsewhere.calls:
        return Cause(
            "GC205",
            f"{form} always takes the branch of the example, which was fixed at capture",
            "write it with torch.where or torch.cond, or use torch.jit.script, which keeps a branch.",
            place,
        )
    return Cause(
        "GC207",
        f"{form} has a constant for the number that {name} read from a tensor, {first.value!r:.40} on the example",
        "keep the value a tensor: leave out item(), float() and int().",
        place,
    )


_OF_SHAPES = {
    "is_contiguous", "stride", "size", "shape", "numel", "nelement", "dim", "ndim", "ndimension", "__len__",
    "storage_offset", "data_ptr", "is_non_overlapping_and_dense",
}  # fmt: skip
_TRUTHS = {"__bool__", "is_nonzero", "equal", "allclose", "__contains__"}


# ------------------------------------------------------------------ Python attributes of the model


def _attributes(form: str, instance: Instance) -> Iterator[Intervention]:
    """Yield eager with constant Python attributes, if a call changes some: a counter was fixed at capture."""
    module = module_of(instance.model)
    if module is None:
        return
    before, after = _around_a_call(instance, lambda: _plain_attributes(module))
    moved = [key for key, value in before.items() if after.get(key, value) != value]
    if not moved:
        return
    owner, name = moved[0]

    def reset(copy: Instance) -> None:
        for path, attribute in moved:
            vars(module_of(copy.model).get_submodule(path))[attribute] = before[path, attribute]  # type: ignore[union-attr]

    yield Intervention(
        Cause(
            "GC207",
            f"{form} has fixed at capture the attribute {f'{owner}.' if owner else ''}{name}, a Python value that "
            f"each call changes ({before[owner, name]!r:.40} before the first, {after[owner, name]!r:.40} after it)",
            "keep it in a buffer (register_buffer), which a graph reads and writes.",
            module=owner or type(module).__name__,
        ),
        before=reset,
    )


def _plain_attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, bool | int | float | str)
    }
