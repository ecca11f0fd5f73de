"""Notes on what a check of gradients holds fixed, disables or does not judge: GC404 to GC409, GC418 and GC423."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl.core.errors import listed
from gradctl.core.findings import Finding, Location, note
from gradctl.gradients.gradient_findings import location
from gradctl.subject.instance import Leaf
from gradctl.tracing.graph import leaves_behind
from gradctl.tracing.recording import Recording
from gradctl.tracing.tracer import SourceLine

_CUT = (
    "gradient flow stops here (detach, no_grad, item, requires_grad_(False), fake quantisation); the value is treated "
    "as a constant"
)
_ESTIMATED = (
    "the gradient of this random sample is an estimator that torch documents (implicit reparameterisation): it is "
    "not checked."
)


def cut_notes(recording: Recording, leaves: Sequence[Leaf], without: set[str]) -> list[Finding]:
    """Return a note for each place where the program cuts a value that moves, and whom that leaves without gradient.

    ``without`` are names of the leaves that have no gradient.
    """
    lost: dict[SourceLine | None, set[str]] = {}
    for cut in recording.cuts.values():
        if cut.moves:
            reached = leaves_behind(cut.sources, leaves) & without if without else set()
            lost.setdefault(cut.place, set()).update(reached)
    notes = []
    for place, names in lost.items():
        behind = f"; it leaves {listed(sorted(names), 4)} without gradient." if names else "."
        notes.append(note("GC404", f"{_CUT}{behind}", location=location(place)))
    return notes + [
        note("GC404", _ESTIMATED, location=location(place)) for place in dict.fromkeys(recording.estimators)
    ]


def hook_notes(recording: Recording, hooked: Sequence[str], *, changes: bool) -> list[Finding]:
    """Return a note for each hook that was disabled: the gradient was judged without it.

    ``hooked`` are names of modules and parameters with hooks of their own; ``changes`` tells whether any gradient is
    another with the hooks.
    """
    places = dict.fromkeys(recording.hooks)
    message = "a gradient hook is disabled during the check: "
    message += "the gradients that it changes are not checked" if changes else "it changes no gradient here"
    return [
        *(note("GC409", f"{message}.", location=location(place)) for place in places),
        *(note("GC409", f"{message} (on {name}).", location=Location(module=name)) for name in hooked),
    ]


def kink_note(names: Sequence[str]) -> Finding:
    """Return the note that the function has a kink at the user's point along these leaves."""
    message = (
        "the function has a kink or jump at this point (relu at 0, a tie in max); these gradients were checked 1e-3 "
        f"away from it: {listed(names, 4)}."
    )
    return note("GC405", message, verdict="non-differentiable", quantity="gradient")


def undifferentiated_note(name: str) -> Finding:
    """Return the note that an output moves with the leaves and has no gradient."""
    message = (
        f"{name} changes with the parameters or inputs, but has no gradient: a custom Function marks it as not "
        "differentiable, or it is computed outside of autograd."
    )
    return note("GC418", message, quantity="output", tensor=name)


def too_large_note(name: str, count: int) -> Finding:
    """Return the note that so many elements of an output absorb what the leaves do."""
    message = (
        f"{name} has {count} elements that are too large to change with the leaves (a mask of -1e30, for example, that "
        "is added): the gradient through them is not checked."
    )
    return note("GC423", message, quantity="output", tensor=name)


def constant_inputs_note() -> Finding:
    """Return the note that the inputs' own gradients were left out."""
    return note(
        "GC404",
        "the model raises an error if its float inputs require gradients (it may convert them to NumPy); they "
        "are constants, and only parameters are checked.",
    )


def not_replayed() -> Finding:
    """Return the finding that the program does other things when run again at the very same point."""
    return Finding(
        code="GC406",
        severity="warning",
        verdict="unresolved",
        quantity="gradient",
        message="with detached values constant, the model computes other outputs at the same point: "
        "finite differences are not reliable.",
    )
