"""The interface of a form: its capture, the outcome of a call, and the error if a model cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from gradctl.core.names import Quantity
from gradctl.subject.instance import Instance, Leaf


class CannotCapture(Exception):
    """A form cannot capture this model.

    Args:
        reason: one sentence.
        details: the stack trace of the original error, for the report.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.details = details


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A model in one form, ready to be called like the model it came from."""

    form: str
    call: Callable[..., Any]  # takes the model's inputs and returns its outputs
    # The tensors that collect gradients, by each qualified name in the user's model; if the form runs on the tensors of
    # the private copy, this includes tensors that are not registered parameters.
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # by qualified name
    seconds: float = 0.0  # the time that the capture took
    reason: str = ""  # how the model was captured, if not as others are in this form
    quantities: frozenset[Quantity] = frozenset({"output", "gradient", "buffer"})  # those that can be compared
    operators: dict[str, int] = field(default_factory=dict)  # calls by operator; empty if the form has no graph
    artifact: Any = None  # the object to save (a ScriptModule, an ExportedProgram)
    # The owner of the state that a call reads and changes: the form's own module, or the private copy if the form runs
    # on it.
    model: Any = None

    def buffers_now(self) -> dict[str, Tensor]:
        """Return the current buffers by name: a model may have assigned new ones since it was captured."""
        return named_tensors(self.model)[1] if isinstance(self.model, nn.Module) else self.buffers


class Form(Protocol):
    """The module of one form. To add one, add a file with this function and a row in the table."""

    def capture(self, instance: Instance) -> Captured:
        """Return the private copy in this form.

        Raises:
            CannotCapture: with the reason.
        """


def to_float64(form: Form, captured: Captured, instance: Instance) -> Captured:
    """Return a form in float64, as a new form: converted by the form's own ``to_float64``, or else captured again.

    ``captured`` is in the native dtype, and not changed; ``instance`` is a promoted private copy.

    Raises:
        CannotCapture: it has no float64 version.
    """
    convert: Callable[[Captured, Instance], Captured] | None = getattr(form, "to_float64", None)
    return form.capture(instance) if convert is None else convert(captured, instance)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The results of one call, forward and backward."""

    outputs: dict[str, Tensor] = field(default_factory=dict)  # by name, detached
    gradients: dict[str, Tensor | None] = field(default_factory=dict)  # by leaf; None if autograd returns none
    state: dict[str, Tensor] = field(default_factory=dict)  # buffers afterwards, and inputs that the call changed
    differentiable: frozenset[str] = frozenset()  # the outputs that require a gradient
    error: Exception | None = None  # that the call raised; the rest is empty then


def named_tensors(module: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return parameters and buffers of a module by each qualified name; both are empty for a function."""
    if not isinstance(module, nn.Module):
        return {}, {}
    return dict(module.named_parameters(remove_duplicate=False)), dict(module.named_buffers(remove_duplicate=False))


def gradient_tensors(leaf: Leaf, captured: Captured) -> tuple[Tensor, ...]:
    """Return the tensors that collect a leaf's gradient when a form runs: the form's of its names, and the leaf's own.

    The latter contribute for an input, and for one that shares memory with a parameter.
    """
    names = (name.removeprefix("param:") for name in (leaf.name, *leaf.tied))
    own = [tensor for name in names if (tensor := captured.parameters.get(name)) is not None]
    return tuple({id(tensor): tensor for tensor in (*own, *leaf.sharing)}.values())


def take_gradient(leaf: Leaf, captured: Captured) -> Tensor | None:
    """Return the gradient that a form left for a leaf, summed over the tensors of one storage; clear it."""
    return replace(leaf, sharing=gradient_tensors(leaf, captured)).take_gradient()


def not_called(*args: Any, **kwargs: Any) -> Any:
    """Raise: a form that is captured in order to be saved runs only after it is loaded again."""
    raise AssertionError("what is in memory is saved and read again before it is run")
