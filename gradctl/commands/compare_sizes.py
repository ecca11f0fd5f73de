"""Static forms compared with eager at other sizes of the inputs: ``compare --sizes``.

A form with free sizes is captured once, on the example, and run at each size. Any other is captured anew, which takes
longer: at the smallest size, at the largest and at one between them, and in each layout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from gradctl.commands.compare import DEFAULT_STATIC_FORMS, Comparing, compare, compare_one
from gradctl.core.allows import Allows
from gradctl.core.errors import TargetError
from gradctl.core.findings import Unit
from gradctl.core.names import RANK_FORMS
from gradctl.forms.table import form_named
from gradctl.gradients.size_sweep import gradcheck_at_sizes, merged
from gradctl.subject.inputs.sizes import EXPANDED, MOST_SIZES, Sizes, sized_subjects, without_layout
from gradctl.subject.seeding import preserve_generators
from gradctl.subject.subject import Subject
from gradctl.subject.torch_private import dynamo_config

_FREE_SIZES = ("script", "aot", "compile")
# Each size and layout may be a recompilation; Dynamo would run eagerly, silently, after eight of them.
_RECOMPILATIONS = 128


class ComparingSizes:
    """The example and other sizes, each with its reference, and the forms that are compared with these.

    Args:
        comparing: the reference on the example.
        sizes: of the inputs.
        limit: as in ``sized_subjects``.
        progress: called with what is being done.

    Raises:
        TargetError: as ``sized_subjects``.
    """

    def __init__(
        self, comparing: Comparing, sizes: Sizes, *, limit: int, progress: Callable[[str], None] | None = None
    ) -> None:
        self.example, self._say = comparing, progress or (lambda text: None)
        self._subjects = dict(sized_subjects(comparing.subject, sizes, limit=limit))
        self._at: dict[str, Comparing | str] = {}

    def form(self, name: str, *, named: bool) -> Unit:
        """Return the verdict on one form at the example and, if it passes there, at the other sizes."""
        start, form = time.perf_counter(), form_named(name)
        captured = self.example.capture(name, named=named)
        if isinstance(captured, Unit):
            return captured
        with ExitStack() as stack:
            if name in ("aot", "compile"):
                stack.enter_context(dynamo_config.patch("recompile_limit", _RECOMPILATIONS))
            units = {"example": self.example.captured(captured, form, start=start)}
            refused: dict[str, str] = {}
            if units["example"].verdict != "pass":
                return units["example"]
            for number, at in enumerate(places := self._places(name), 1):
                self._say(f"{name}, {number} of {len(places)} sizes, {at}")
                comparing = self._comparing(at)
                if isinstance(comparing, str):
                    refused[at] = comparing
                    continue
                own = captured if name in _FREE_SIZES else comparing.capture(name, named=named)
                if isinstance(own, Unit):
                    refused[at] = own.reason or "it is not captured"
                else:
                    units[at] = comparing.captured(own, form)
        example = units["example"]
        variations = (*example.variations, *list(units)[1:])
        return msgspec.structs.replace(merged(units, refused), timing=example.timing, variations=variations)

    def put_back(self) -> None:
        """Put back the user's own tensors that could not be copied."""
        for comparing in reversed(self._at.values()):
            if isinstance(comparing, Comparing):
                comparing.put_back()

    def _places(self, form: str) -> list[str]:
        """Return the sizes and layouts at which a form is tried."""
        if form in RANK_FORMS:  # the loss of an expanded cotangent is a sum, which ranks would average
            return _few({name: each for name, each in self._subjects.items() if not name.endswith(EXPANDED)})
        return list(self._subjects) if form in _FREE_SIZES else _few(self._subjects)

    def _comparing(self, at: str) -> Comparing | str:
        """Return the reference at a size, made for the first form, or the reason why it cannot be made."""
        if at not in self._at:
            subject, example = self._subjects[at], self.example
            try:
                if isinstance(subject, TargetError):
                    raise subject
                self._at[at] = Comparing(subject, example.allows, fail_on=example.fail_on, is_brief=True)
            except TargetError as error:
                self._at[at] = error.message
        return self._at[at]


def _few(names: Mapping[str, object]) -> list[str]:
    """Return the smallest, a middle and the largest size, and all layouts, in order."""
    plain: Sequence[str] = [name for name in names if name == without_layout(name)]
    few = {plain[0], plain[len(plain) // 2], plain[-1]}
    return [name for name in names if name in few or name not in plain]


def compare_at_sizes(
    subject: Subject,
    sizes: Sizes,
    *,
    limit: int = MOST_SIZES,
    forms: Sequence[str] = DEFAULT_STATIC_FORMS,
    named: bool = False,
    allows: Allows,
    fail_on: str = "error",
    progress: Callable[[str], None] | None = None,
    on_unit: Callable[[Unit], None] | None = None,
    **of_comparing: Any,
) -> list[Unit]:
    """Return what ``compare`` does, at all sizes; on the example alone if there are no ``sizes``.

    Raises:
        TargetError: as ``gradcheck_at_sizes``.
    """
    if not sizes:
        options: dict[str, Any] = {"allows": allows, "fail_on": fail_on, "progress": progress, "on_unit": on_unit}
        return compare(subject, forms=forms, named=named, **options, **of_comparing)
    units: list[Unit] = []
    with preserve_generators():
        comparing = Comparing(subject, allows, fail_on=fail_on, **of_comparing)
        others = ComparingSizes(comparing, sizes, limit=limit, progress=progress)
        check = partial(gradcheck_at_sizes, subject, sizes, limit=limit, progress=progress)
        checks = [partial(check, allows=allows, fail_on=fail_on)]
        checks += [partial(others.form, name, named=named) for name in forms]
        try:
            for each in checks:
                units.append(each())
                if on_unit is not None:
                    on_unit(units[-1])
        finally:
            others.put_back()
            comparing.put_back()
    return units


def compare_one_at_sizes(
    subject: Subject, form: str, sizes: Sizes, *, limit: int, allows: Sequence[str], named: bool = True, **options: Any
) -> Unit:
    """Return the verdict on one form at all sizes, or without sizes on the example: what a process of its own does.

    ``options`` are those of ``Comparing``.
    """
    if not sizes:
        return compare_one(subject, form, named=named, allows=allows, **options)
    comparing = Comparing(subject, Allows(allows), **options)
    return ComparingSizes(comparing, sizes, limit=limit).form(form, named=named)
