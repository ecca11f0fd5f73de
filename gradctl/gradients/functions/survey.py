"""The custom Functions that a model applies, and how its own backward uses each."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradctl.gradients.part import Cotangents, expanded, gaussian
from gradctl.numerics.runner import refusals_ignored
from gradctl.subject.frames import user_location
from gradctl.tracing.functions import FunctionObserver, is_users
from gradctl.tracing.graph import innermost_module, leaves_behind
from gradctl.tracing.model_runner import ModelRunner
from gradctl.tracing.tracer import Apply, FunctionClass, SourceLine

# Where ``Application.leaves`` has those behind the cotangents: no position of an argument.
COTANGENTS = -1


@dataclass(slots=True, eq=False)
class Application:
    """One application of a custom Function, and how the model's own backward uses it."""

    number: int  # of the application in its run
    function: FunctionClass
    group: tuple[Any, ...]  # equal for those that do the same: class, shapes and dtypes of tensors, other arguments
    bytes: int  # of the tensors among its arguments
    place: SourceLine | None  # of the caller
    module: str | None  # path of the module that applies it; None outside any, "" for the model itself
    inside: bool = False  # a transform of torch.func, where the cotangents that arrive are not seen
    outputs: set[int] = field(default_factory=set)  # numbers of those that get a cotangent
    # What not every caller does: a cotangent that is not contiguous (``expanded``, ``strided``) or that one output has
    # and another has not (``undefined``), a backward that is itself differentiated (``second-order``), dual tensors
    # (``forward-mode``).
    uses: set[str] = field(default_factory=set)
    # Names of those behind each argument, by position, and at ``COTANGENTS`` behind what arrives in a backward that is
    # itself differentiated; only if ``survey`` is asked for them.
    leaves: dict[int, set[str]] = field(default_factory=dict)

    @property
    def is_used(self) -> bool:
        """Whether a gradient passes it at all."""
        return self.inside or bool(self.outputs)

    @property
    def is_differentiated_twice(self) -> bool:
        """Whether its backward is itself differentiated, as far as is seen."""
        return self.inside or "second-order" in self.uses


def survey(runner: ModelRunner, behind: Collection[int] = ()) -> list[Application]:
    """Return the applications of custom Functions at the present values of the leaves, one backward run through them.

    The backward is that of ``sum``: what follows a Function decides how the cotangent lies that it gets.

    The leaves behind an application are searched if its number is in ``behind``.
    """
    refused: dict[int, set[str]] = {}
    for cotangents in (expanded, gaussian):
        seen = _Survey(runner, behind)
        with runner.instance.preserve_leaves():
            is_refused = not run_backward(runner, seen, cotangents)
        for number, uses in refused.items():
            if number in seen.applications:
                seen.applications[number].uses |= uses
        if not is_refused:
            break
        refused = {number: each.uses for number, each in seen.applications.items()}
    return list(seen.applications.values())


def run_backward(runner: ModelRunner, observer: FunctionObserver, cotangents: Cotangents) -> bool:
    """Run the model at its leaves, observed, and one backward; return whether that raised nothing."""
    with observed(runner, observer):
        outputs = [t for _, t in runner.record() if t.requires_grad and t.layout == torch.strided]
    try:
        with refusals_ignored(), runner.promoted():  # a backward that refuses an expanded cotangent, say
            torch.autograd.backward(outputs, cotangents(outputs))
            return True
        return False
    finally:
        for leaf in runner.leaves:
            leaf.take_gradient()


class _Survey:
    def __init__(self, runner: ModelRunner, behind: Collection[int]) -> None:
        self.runner, self.behind = runner, behind
        self.applications: dict[int, Application] = {}

    def before(
        self, number: int, function: FunctionClass, apply: Apply, args: tuple[Any, ...], *, inside: bool = False
    ) -> None:
        tensors = {k: arg for k, arg in enumerate(args) if isinstance(arg, Tensor)}
        requiring = {k: arg for k, arg in tensors.items() if arg.requires_grad}
        if not requiring or not is_users(function):
            return
        self.applications[number] = Application(
            number,
            function,
            (function, *map(_kind, args)),
            sum(map(_bytes, tensors.values())),
            user_location(),
            innermost_module(self.runner.watch.modules),
            inside=inside,
            uses={"forward-mode"} if forward_ad._current_level >= 0 else set(),
            leaves={k: self._behind(arg) for k, arg in requiring.items()} if number in self.behind else {},
        )

    def after(self, number: int, result: Any) -> None:
        if number in self.applications and not self.applications[number].inside:
            self._watch(self.applications[number], result)

    def _behind(self, arg: Tensor) -> set[str]:
        own = {leaf.name for leaf in self.runner.leaves if any(arg is t for t in (leaf.sharing or (leaf.tensor,)))}
        return own | leaves_behind([arg.grad_fn], self.runner.leaves)

    def _watch(self, application: Application, result: Any) -> None:
        """See what cotangents arrive, in the backward to come and in one that the program itself runs."""
        nodes: dict[Any, set[int]] = {}
        for k, y in numbered(result).items():
            if y.requires_grad and y.grad_fn is not None:
                nodes.setdefault(y.grad_fn, set()).add(k)
        for node, numbers in nodes.items():

            def arrived(cotangents: Sequence[Tensor | None], numbers: set[int] = numbers) -> None:
                given = {k for k in numbers if k < len(cotangents) and cotangents[k] is not None}
                application.outputs |= given
                application.uses |= {"undefined"} if given and given != numbers else set()
                if torch.is_grad_enabled():
                    application.uses.add("second-order")
                    application.leaves.setdefault(COTANGENTS, set()).update(
                        *(self._behind(cotangents[k]) for k in given if application.number in self.behind)  # type: ignore[arg-type]
                    )
                for k in given:
                    application.uses |= layout(cotangents[k])  # type: ignore[arg-type]  # one that is there

            node.register_prehook(arrived)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def layout(tensor: Tensor) -> set[str]:
    """Return what is unusual about the strides of a tensor: ``expanded``, ``strided``, or nothing."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return set()
    spread = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return {"expanded" if 0 in spread else "strided"}


def _kind(arg: Any) -> Any:
    """Return what two calls with arguments of one kind share; numbers differ from call to call (a step, a rate)."""
    if isinstance(arg, Tensor):
        return tuple(arg.shape), arg.dtype, arg.layout, arg.requires_grad
    return arg if isinstance(arg, (bool, str, type(None))) else type(arg)


def choose_sample(applications: Iterable[Application], seed: int) -> list[Application]:
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


@contextmanager
def observed(runner: ModelRunner, observer: FunctionObserver) -> Iterator[None]:
    """Show the applications of Functions to ``observer``."""
    runner.watch.observer = observer
    try:
        yield
    finally:
        runner.watch.observer = None


def numbered(result: Any) -> dict[int, Tensor]:
    """Return the tensors that a Function gives by the number that its node gives them, which is their place."""
    results = result if isinstance(result, tuple) else (result,)
    return {k: y for k, y in enumerate(results) if isinstance(y, Tensor)}
