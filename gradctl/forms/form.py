"""What every form has in common: what was captured, what a run of it gives, and how a capture is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from gradctl.core.names import Quantity
from gradctl.subject.instance import Instance, Leaf

__all__ = ["CannotCapture", "Captured", "Form", "Outcome", "collecting", "gradient_of", "not_called"]


class CannotCapture(Exception):
    """A form cannot take this model.

    Args:
        reason: one sentence of ours.
        details: the stack of what refused, for the report.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A model in one form, ready to be called like the model it came from.

    Attributes:
        form: its name.
        call: takes the model's inputs and gives its outputs.
        parameters: what collects gradients, by each qualified name in the user's model; where the form runs on the
            private copy's own tensors, those that are no registered parameters too.
        buffers: by qualified name.
        seconds: what capturing took.
        quantities: the quantities that can be compared.
        operators: calls by operator, for the summary; empty where the form has no graph to show.
        artifact: what can be saved (a ScriptModule, an ExportedProgram), or None.
        model: what holds the state that a call reads and changes: the form's own module, or the private copy where the
            form runs on that; None where it has no state.
    """

    form: str
    call: Callable[..., Any]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    quantities: frozenset[Quantity] = frozenset({"output", "gradient", "buffer"})
    operators: dict[str, int] = field(default_factory=dict)
    artifact: Any = None
    model: Any = None

    def buffers_now(self) -> dict[str, Tensor]:
        """Return the buffers by name as they are: a model may have assigned new ones since it was captured."""
        if not isinstance(self.model, nn.Module):
            return self.buffers
        return dict(self.model.named_buffers(remove_duplicate=False))


class Form(Protocol):
    """How one form captures. Adding one is adding a file with these two functions, and a row in the table."""

    def capture(self, instance: Instance) -> Captured:
        """Return the private copy in this form.

        Raises:
            CannotCapture: with the reason.
        """

    def to_float64(self, captured: Captured, instance: Instance) -> Captured:
        """Return the same in float64, as a new form: a converted copy, or captured again from the promoted instance.

        Raises:
            CannotCapture: it cannot be had.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one call gave, forward and backward.

    Attributes:
        outputs: by name, detached.
        gradients: by leaf; None where autograd gives none.
        state: buffers after the call, and inputs that the call changed, by name.
        differentiable: the outputs that asked for a gradient.
        error: what the call raised, if it did; the rest is empty then.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    differentiable: frozenset[str] = frozenset()
    error: Exception | None = None


def collecting(leaf: Leaf, captured: Captured) -> tuple[Tensor, ...]:
    """Return the tensors that collect a leaf's gradient where a form runs: the form's of its names, and the leaf's own.

    The latter have a part for an input, and for one that shares memory with a parameter.
    """
    names = (name.removeprefix("param:") for name in (leaf.name, *leaf.tied))
    own = [tensor for name in names if (tensor := captured.parameters.get(name)) is not None]
    return tuple({id(tensor): tensor for tensor in (*own, *leaf.sharing)}.values())


def gradient_of(leaf: Leaf, captured: Captured) -> Tensor | None:
    """Return the gradient that a form left for a leaf, summed over the tensors that stand for one storage; clear it."""
    return replace(leaf, sharing=collecting(leaf, captured)).take_gradient()


def not_called(*args: Any, **kwargs: Any) -> Any:
    """Stand for the call of what is captured to be written: it is run once it was read again."""
    raise AssertionError("what is in memory is saved and read again before it is run")
