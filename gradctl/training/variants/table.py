"""The variants of the training step by name. ``core.names.VARIANTS`` lists the same names without importing torch.

To add one:

1. Write a file in this folder with one function, ``alter(trainer: Trainer, argument: str | None) -> None``. It is
   called before the first step of a run, and replaces parts of that run (``training/trainer.py`` describes them):
   ``call`` (in place of the model), ``forward`` (from the inputs to the loss), ``backward``, ``update``, ``step`` (all
   of it), or what they work on: modules of ``trainer.module``, ``parameters`` (before the first use of
   ``trainer.optimizer``), the ``optimizer``. The plain parts stay available as ``trainer.plain_forward`` ….
   ``before_step`` is called between steps.
   ``alter`` raises ``CannotApply(reason)``, one sentence, if the variant cannot apply to this model: its unit is
   skipped with the reason (inconclusive if the user named the variant). ``argument`` is the text behind the colon
   (``accumulate:4``).
2. Add a row below, and the name with the default of its argument to ``VARIANTS`` in ``core/names.py``; to
   ``VARIANTS_IN_PROCESS``, too, if it can hang or crash (a compiler).

Each variant runs twice: in float64, on a promoted copy under the promotion mode (``trainer.is_float64``), and in the
native dtype. It is compared with the plain step after each step, and must compute the same loss, gradients (as they are
when ``optimizer.step()`` is entered), parameters, optimizer state and buffers, within the tolerance of
``numerics/repetition.py``. Fields of a row say what differs from that:

- ``promotes=False``: its float64 run is without the promotion mode, in which Dynamo silently runs eager; it is compared
  with a plain run without it.
- ``rounding``: name of a dtype (``bfloat16``), or a function of the argument that returns one, to which the variant
  rounds on purpose: in the native run, tolerance and noise are those of this dtype.
- ``plain``: a function ``alter`` for the plain step with which the variant is compared, if that is not the model's own
  step (an adapter trained in a model whose other weights are trained, too).

A file may have a second function, ``experiments(argument)``, which tests the causes of a difference
(``training/step_experiments.py``). In a file of several rows, each row names its function as ``entry``, which
``experiments(argument, entry)`` is called with, too.

``trainer.loss_of(outputs, rows)`` is the loss of a micro-batch: for a loss that is the sum of all outputs with random
weights, ``rows`` selects the weights. ``trainer.recipe.loss_name(outputs)`` is None for such a loss.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from gradctl.core.errors import TargetError
from gradctl.training.trainer import Trainer

Alter = Callable[[Trainer, str | None], None]


class CannotApply(Exception):
    """A variant cannot apply to this model, for a reason in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One row: where ``alter`` is, or ``entry`` in its place, and how its runs are compared (see above)."""

    module: str
    entry: str = "alter"
    promotes: bool = True
    rounding: str | Callable[[str | None], str | None] | None = None
    plain: str | None = None  # name of a function beside ``alter``

    def function(self, name: str = "alter") -> Alter:
        """Return a function of the variant's file, imported on demand."""
        found: Alter = getattr(importlib.import_module(self.module), name)
        return found


def _rounding_of_autocast(argument: str | None) -> str:
    # Beside the table, so that no other variant imports this one's file.
    if (argument or "") not in AUTOCAST_DTYPES:
        raise TargetError("GC145", f"amp takes the dtype bf16 or f16 (amp:bf16), not {argument!r}.")
    return AUTOCAST_DTYPES[argument or ""]


AUTOCAST_DTYPES = {"bf16": "bfloat16", "f16": "float16"}
_FOLDER = "gradctl.training.variants"
TABLE = {
    "compile": Variant(f"{_FOLDER}.compiled_forward", promotes=False),
    "compile-step": Variant(f"{_FOLDER}.compiled_step", promotes=False),
    "accumulate": Variant(f"{_FOLDER}.accumulation"),
    "checkpoint": Variant(f"{_FOLDER}.checkpoint"),
    "checkpoint-reentrant": Variant(f"{_FOLDER}.reentrant"),
    "amp": Variant(f"{_FOLDER}.autocast", rounding=_rounding_of_autocast),
    "foreach": Variant(f"{_FOLDER}.foreach"),
    "fused": Variant(f"{_FOLDER}.fused"),
    "lora": Variant(f"{_FOLDER}.lora", plain="plain"),
    "resume": Variant(f"{_FOLDER}.resume"),
    "ddp": Variant(f"{_FOLDER}.many_ranks", "ddp", plain="plain"),
    "fsdp": Variant(f"{_FOLDER}.many_ranks", "fsdp", plain="plain"),
    "tp": Variant(f"{_FOLDER}.many_ranks", "tp", plain="plain"),
    "ranks": Variant(f"{_FOLDER}.many_ranks", "ranks", plain="plain"),
}
