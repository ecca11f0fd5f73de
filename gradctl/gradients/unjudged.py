"""Tensors that have a gradient and cannot be judged, and what a private copy shares with the user's model: by name."""

from __future__ import annotations

__all__ = ["Kept", "ObservedInstance", "closed_notes", "shared_note", "stranger_note"]

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gradctl.core.findings import Finding
from gradctl.core.names import input_name, output_name
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance, restore_shared
from gradctl.subject.reach import walk
from gradctl.subject.state import State
from gradctl.tracing.graph import node_of, nodes_behind

_FEW = 3  # names that a message lists


class Kept:
    """What a check borrows of the user's own, where it cannot have a copy, to be put back at its end."""

    def __init__(self, instance: Instance) -> None:
        self._state = State(instance.shared.values())
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def borrow(self, tensor: Tensor) -> None:
        """Set the gradient of a tensor aside."""
        if id(tensor) not in self._gradients:
            self._gradients[id(tensor)] = tensor, tensor.grad
            tensor.grad = None

    def put_back(self) -> None:
        """Put back state and gradients."""
        restore_shared()
        self._state.restore()
        for tensor, gradient in self._gradients.values():
            tensor.grad = gradient


class ObservedInstance:
    """An instance whose runs are looked at for leaves that it does not know.

    Attributes:
        strangers: those of the last run.
        kept: what is to be put back.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance, self.kept = instance, Kept(instance)
        self.strangers: list[Tensor] = []

    def see(self, outputs: Iterable[Tensor]) -> None:
        """Look at the graph of the outputs of a run."""
        known = {id(tensor) for leaf in self.instance.leaves for tensor in leaf.sharing}
        nodes = nodes_behind(node_of(output) for output in outputs)
        found = (getattr(node, "variable", None) for node in nodes)
        self.strangers = [tensor for tensor in found if isinstance(tensor, Tensor) and id(tensor) not in known]
        for tensor in self.strangers:
            self.kept.borrow(tensor)


def stranger_note(tensor: Tensor) -> Finding:
    """Return the note that a tensor outside the model and its inputs gets a gradient, which is not judged."""
    what = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return Finding(
        code="GC421",
        severity="note",
        message=f"a tensor {what} requires a gradient and is not judged: it is reached neither from the model nor from "
        "its inputs (a global variable, or an attribute of a class).",
        hint="make it a parameter or an attribute of the model, or pass it as an input.",
    )


def closed_notes(instance: Instance) -> list[Finding]:
    """Return a note for each input and output of a run that cannot be opened and holds float tensors.

    What asks for a gradient in an input (a module) is a leaf, like the model's own.
    """
    subject = instance.subject
    inputs = input_names(subject.model, subject.args, subject.kwargs)
    named = [(input_name(path), value) for path, value in inputs if not isinstance(value, nn.Module)]
    named += [(output_name(path), value) for path, value in instance.closed_outputs]
    return [
        _closed_note(name, value) for name, value in named if not isinstance(value, Tensor) and _has_float(value, name)
    ]


def _has_float(value: Any, name: str) -> bool:
    is_input = name.startswith("input")
    tensors = (found for _, found in walk([((), value)]) if isinstance(found, Tensor))
    return any(
        (tensor.is_floating_point() and not tensor.requires_grad) if is_input else tensor.grad_fn is not None
        for tensor in tensors
    )


def _closed_note(name: str, value: Any) -> Finding:
    kind = type(value).__name__
    return Finding(
        code="GC421",
        severity="note",
        tensor=name,
        message=f"{name} is of type {kind!r}, which cannot be opened: the tensors in it are not judged.",
        hint="give them in a tuple, list, dict, dataclass, or an object that keeps them as attributes.",
    )


def shared_note(names: Iterable[str]) -> Finding:
    """Return the note that the copy which is checked shares objects with the user's model."""
    names = list(names)
    listed = ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
    return Finding(
        code="GC422",
        severity="note",
        message=f"the copy that is checked shares {listed} with your model, because a __deepcopy__ does not copy; it "
        "is used as it is, in its own dtype, and put back after the check.",
        hint="remove that __deepcopy__, or let it copy.",
    )
