"""The forms ``ddp:N``, ``fsdp:N``, ``tp:N`` and ``ranks:N``: calls that run a model on N ranks, and backwards."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from gradctl.forms.eager import wrap_module
from gradctl.forms.form import CannotCapture, Captured
from gradctl.forms.ranks.processes import RankFailed
from gradctl.forms.ranks.ranks_run import RanksRun, ensure_runnable
from gradctl.forms.ranks.sharing import as_returned, shares_of
from gradctl.subject.instance import Instance


@dataclass(frozen=True, slots=True)
class RankForm:
    """One of the forms of many ranks.

    Attributes:
        kind: ``ddp``, ``fsdp``, ``tp`` or ``ranks``.
        world: the number of ranks.
    """

    kind: str
    world: int

    def capture(self, instance: Instance) -> Captured:
        """Return the model on this many ranks, which are started by each call and end after its backward.

        Raises:
            CannotCapture: it cannot be arranged in this way.
        """
        ensure_runnable(self.kind, instance)
        shares_of(self.kind, self.world, instance.subject)
        return wrap_module(f"{self.kind}:{self.world}", instance, RanksCall(self, instance))


class RanksCall:
    """A call of the model on the inputs that the private copy has, on ranks of its own."""

    applies_loss = True

    def __init__(self, form: RankForm, instance: Instance) -> None:
        self._form, self._instance = form, instance
        self._end: weakref.finalize[Any, Any] | None = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Return the outputs of the whole batch, with the graph that makes the ranks compute gradients.

        Raises:
            CannotCapture: the model cannot be arranged in this way, or a rank fails.
        """
        if self._end is not None:
            self._end()
        is_float64 = any(leaf.tensor.dtype == torch.float64 for leaf in self._instance.leaves)
        try:
            run = RanksRun(self._form.kind, self._form.world, self._instance, promotes=is_float64)
            self._end = weakref.finalize(self, run.close)
            outputs = run.forward()
        except RankFailed as failure:
            raise CannotCapture(f"{failure.reason}.", failure.details) from failure
        names = [name for name in outputs if name in run.requiring]
        tensors = [leaf.tensor for leaf in self._instance.leaves]
        found = _OnRanks.apply(run, names, [outputs[name] for name in names], *tensors)  # type: ignore[no-untyped-call]
        outputs |= dict(zip(names, found, strict=True))
        return as_returned(outputs)


class _OnRanks(Function):
    """The outputs that the ranks have computed, as functions of the leaves."""

    @staticmethod
    def forward(ctx: Any, run: RanksRun, names: list[str], outputs: list[Tensor], *leaves: Tensor) -> Any:
        ctx.run, ctx.names = run, names
        return tuple(each.clone() for each in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        try:
            gradients = ctx.run.backward(dict(zip(ctx.names, cotangents, strict=True)))
        except RankFailed as failure:
            raise CannotCapture(f"{failure.reason}.", failure.details) from failure
        finally:
            ctx.run.close()
        return None, None, None, *gradients.values()
