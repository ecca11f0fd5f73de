"""What the tests of ``gradctl compare`` read off its result: what differs from eager, and which side is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.core.findings import Unit
from gradctl.core.names import TensorVerdict
from gradctl.subject.subject import Subject

__all__ = ["causes", "compared", "comparing", "different", "gradients_of", "verdicts"]


def comparing(
    model: Callable[..., Any], *args: Any, kwargs: dict[str, Any] | None = None, allows: Sequence[str] = ()
) -> Comparing:
    """Return eager on these inputs, to hold forms against."""
    return Comparing(Subject(target="test", model=model, args=args, kwargs=kwargs or {}), Allows(allows))


def compared(form: str, model: Callable[..., Any], *args: Any, named: bool = True, **options: Any) -> Unit:
    """Return the unit of one form; ``options`` are those of ``comparing``."""
    return comparing(model, *args, **options).form(form, named=named)


def different(unit: Unit) -> dict[str, str]:
    """Return the codes of all errors, by tensor; ``""`` stands for the form itself."""
    return {each.tensor or "": each.code for each in unit.findings if each.severity == "error"}


def causes(unit: Unit) -> set[str | None]:
    """Return the causes of all errors; None stands for one without."""
    return {each.cause for each in unit.findings if each.severity == "error"}


def verdicts(unit: Unit) -> dict[str, TensorVerdict]:
    """Return the verdicts on gradients, by tensor."""
    return {each.tensor: each.verdict for each in unit.tensors if each.quantity == "gradient"}


def gradients_of(call: Callable[..., Any], *inputs: Tensor) -> list[Tensor | None]:
    """Return the gradients that plain torch leaves in copies of ``inputs`` for the sum of the output."""
    leaves = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in inputs]
    call(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]
