"""One published mistake: a model, perhaps a step of its own, and the variant that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake and its clean twin.

    Attributes:
        name: of the test.
        source: where the mistake was published.
        variant: the variant that shows it.
        model: ``model(wrong)`` makes the model, with or without the mistake.
        inputs: makes the inputs, positional and by keyword.
        step: ``step(wrong)`` returns a step of the user's; the mistake is in the model if it is None.
        optimizer: ``optimizer(wrong)`` returns the factory of the optimizer; None for the default.
        cause: the rule code of the cause, if the variant names one.
        loss: of the outputs, if the step has another than the sum of them with random weights.
        first_step: the step, from 1, at which the mistake appears.
    """

    name: str
    source: str
    variant: str
    model: Callable[[bool], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    step: Callable[[bool], Callable[..., Any]] | None = None
    optimizer: Callable[[bool], Callable[..., Any]] | None = None
    cause: str | None = None
    loss: Callable[..., Any] | None = None
    first_step: int = 1

    def __str__(self) -> str:
        return self.name
