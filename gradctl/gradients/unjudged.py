"""Tensors that have a gradient and cannot be judged, and what a private copy shares with the user's model: by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gradctl.core.findings import Finding, note
from gradctl.core.names import input_name, output_name
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance, restore_shared
from gradctl.subject.reach import walk
from gradctl.subject.state import State
from gradctl.tracing.graph import node_of, nodes_behind

_FEW = 3  # names that a message lists


class Kept:
    """State and gradients of the user's own objects that a check uses without a copy; restored at its end."""

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
    """An instance whose runs are looked at for leaves that it does not know. They are those of the last run."""

    def __init__(self, instance: Instance) -> None:
        self.instance, self.kept = instance, Kept(instance)
        self.unknown_leaves: list[Tensor] = []

    def see(self, outputs: Iterable[Tensor]) -> None:
        """Look at the graph of the outputs of a run."""
        known = {id(tensor) for leaf in self.instance.leaves for tensor in leaf.sharing}
        nodes = nodes_behind(node_of(output) for output in outputs)
        found = (getattr(node, "variable", None) for node in nodes)
        self.unknown_leaves = [tensor for tensor in found if isinstance(tensor, Tensor) and id(tensor) not in known]
        for tensor in self.unknown_leaves:
            self.kept.borrow(tensor)


def unknown_leaf_note(tensor: Tensor) -> Finding:
    """Return the note that a tensor outside the model and its inputs gets a gradient, which is not judged."""
    what = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return note(
        "GC421",
        f"a tensor {what} requires a gradient and is not checked: it is neither a part of the model nor of "
        "its inputs (a global variable, or an attribute of a class).",
        "make it a parameter or an attribute of the model, or pass it as an input.",
    )


def closed_notes(instance: Instance) -> list[Finding]:
    """Return a note for each input and output of a run that cannot be opened and holds float tensors.

    A tensor in an input (a module) that requires a gradient is a leaf, like the model's own.
    """
    subject = instance.subject
    inputs = input_names(subject.model, subject.args, subject.kwargs)
    named = [(input_name(path), value) for path, value in inputs if not isinstance(value, nn.Module)]
    named += [(output_name(path), value) for path, value in instance.closed_outputs]
    return [
        note(
            "GC421",
            f"{name} is of type {type(value).__name__!r}, which cannot be opened: the tensors in it are not checked.",
            "pass them in a tuple, list, dict, dataclass, or an object that keeps them as attributes.",
            tensor=name,
        )
        for name, value in named
        if not isinstance(value, Tensor) and _has_float(value, name)
    ]


def _has_float(value: Any, name: str) -> bool:
    is_input = name.startswith("input")
    tensors = (found for _, found in walk([((), value)]) if isinstance(found, Tensor))
    return any(
        (tensor.is_floating_point() and not tensor.requires_grad) if is_input else tensor.grad_fn is not None
        for tensor in tensors
    )


def shared_note(names: Iterable[str]) -> Finding:
    """Return the note that the copy which is checked shares objects with the user's model."""
    names = list(names)
    listed = ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
    return note(
        "GC422",
        f"the copy that is checked shares {listed} with your model, because a __deepcopy__ does not copy; it "
        "is used without a copy, in its own dtype, and restored after the check.",
        "remove that __deepcopy__, or let it copy.",
    )
