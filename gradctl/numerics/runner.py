"""The interface of the functions that finite differences judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor

from gradctl.core.errors import is_out_of_memory
from gradctl.subject.instance import Leaf

Outputs = list[tuple[str, Tensor]]


class Runner(Protocol):
    """A function of leaves, whose tensors are written before each call.

    ``differentiate`` runs as training does and returns outputs with their graph; ``record`` runs at the point and notes
    what must be held fixed; ``beside`` runs with that held fixed. ``extra`` is what the last run adds to the objective.
    """

    leaves: Sequence[Leaf]

    @property
    def extra(self) -> float:
        """What the last run adds to the objective besides its outputs."""

    @property
    def writes(self) -> bool:
        """Whether a run may change a leaf without counting a version."""

    def differentiate(self) -> Outputs:
        """Return the outputs with their graph."""

    def record(self) -> Outputs:
        """Return the outputs at the point."""

    def beside(self) -> Outputs:
        """Return the outputs beside the point."""

    def promoted(self) -> AbstractContextManager[None]:
        """Return the context of a backward."""


@contextmanager
def refusals_ignored() -> Iterator[None]:
    """Go on after any exception of the user's program; that the machine is out of memory is raised."""
    try:
        yield
    except Exception as error:  # the program may refuse a value beside the point, and raise anything
        if is_out_of_memory(error):
            raise
