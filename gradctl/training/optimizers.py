"""The optimizer of a training run: one of torch's by name, or one that a function of the user's makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradctl.core.errors import TargetError, is_out_of_memory, nearest
from gradctl.core.names import OPTIMIZERS
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.loading.target import find_by_text

_TABLE: dict[str, Callable[[Sequence[Tensor]], Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerChoice:
    """An optimizer by name.

    Attributes:
        name: what messages call it.
        factory: ``factory(parameters)`` returns the optimizer, or the optimizer and a learning rate scheduler.
    """

    name: str
    factory: Callable[[Sequence[Tensor]], Any]

    def make(self, parameters: Sequence[Tensor]) -> tuple[Optimizer, Any]:
        """Return a new optimizer of these parameters, and its scheduler or None.

        Raises:
            TargetError: GC144 if the factory raises, or returns something else.
        """
        try:
            made = self.factory(list(parameters))
        except Exception as error:  # the user's factory may raise anything
            if is_out_of_memory(error):
                raise
            said = f"the optimizer {self.name} raises {first_line(error)}. It is called with the list of parameters."
            raise TargetError("GC144", said, details=user_frames(error)) from error
        optimizer, scheduler = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(optimizer, Optimizer) or (scheduler is not None and not hasattr(scheduler, "step")):
            raise TargetError(
                "GC144",
                f"the optimizer {self.name} returns {type(made).__name__!r}. Return a torch.optim.Optimizer, or an "
                "Optimizer and a scheduler.",
            )
        return optimizer, scheduler


def optimizer_choice(given: str | Callable[[Sequence[Tensor]], Any]) -> OptimizerChoice:
    """Return the optimizer of ``--optimizer``: a name, ``FILE:FACTORY``, or the factory itself.

    Raises:
        TargetError: GC144 if there is no such optimizer; GC101 to GC103 if the file cannot be imported.
    """
    if not isinstance(given, str):
        if not callable(given):
            raise TargetError("GC144", f"the optimizer is {given!r}. Give {_names()}, or a function of parameters.")
        return OptimizerChoice(getattr(given, "__name__", type(given).__name__), given)
    if given in _TABLE:
        return OptimizerChoice(given, _TABLE[given])
    if ":" not in given:
        said = f"there is no optimizer {given!r}{nearest(given, OPTIMIZERS)}. Give {_names()}, or FILE:FACTORY."
        raise TargetError("GC144", said)
    found = find_by_text(given, "GC144")
    if not callable(found):
        raise TargetError("GC144", f"the optimizer {given} is of type {type(found).__name__!r}, not a function.")
    return OptimizerChoice(given, found)


def _names() -> str:
    return ", ".join(OPTIMIZERS)
