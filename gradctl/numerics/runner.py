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
    """A function of leaves, whose tensors are written before each call."""

    leaves: Sequence[Leaf]

    @property
    def extra(self) -> float:
        """What the last run adds to the objective besides its outputs."""

    @property
    def writes(self) -> bool:
        """Whether a run may change a leaf without counting a version."""

    def differentiate(self) -> Outputs:
        """Return the outputs with their graph, from a run as in training."""

    def record(self) -> Outputs:
        """Return the outputs at the point, and note what must be held fixed."""

    def beside(self) -> Outputs:
        """Return the outputs beside the point, with that held fixed."""

    def promoted(self) -> AbstractContextManager[None]:
        """Return the context of a backward."""


@contextmanager
def refusals_ignored() -> Iterator[None]:
    """Ignore any exception of the user's program, except that the machine is out of memory."""
    try:
        yield
    except Exception as error:  # the program may reject a value beside the point, and raise anything
        if is_out_of_memory(error):
            raise
