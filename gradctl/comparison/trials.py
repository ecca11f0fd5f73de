"""Trials: sets of inputs, and the outcomes of the reference on them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from gradctl.core.names import Quantity
from gradctl.forms.form import Outcome
from gradctl.subject.inputs.sizes import EXPANDED
from gradctl.subject.instance import Instance

R = TypeVar("R")
ALL_QUANTITIES: frozenset[Quantity] = frozenset({"output", "gradient", "buffer"})
# The name of the trial whose calls autograd does not record: many kernels have another path for inference.
NO_GRAD = "no_grad"
# The name of the trial whose model ran on the example before, on inputs of the same shapes: caches may be stale.
AFTER_EXAMPLE = "seed after example"


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One set of inputs, and what the reference computes from them.

    Attributes:
        name: of the variation; the first is the ``example``.
        native: calls in the reference's own dtype; fewer than three if a later one raises.
        oracle: the same calls in float64; ``native`` if there are none.
        noisy: the first call where inputs and weights are changed by an ULP: the noise, if there is no float64 run.
    """

    name: str
    native: Sequence[Outcome]
    oracle: Sequence[Outcome]
    noisy: Sequence[Outcome] = ()
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False)

    @property
    def quantities(self) -> frozenset[Quantity]:
        """What is compared."""
        return ALL_QUANTITIES

    def compute_once(self, key: Hashable, compute: Callable[[], R]) -> R:
        """Return what depends on the reference alone: computed for the first candidate, and kept for the others."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelTrial(Trial):
    """Inputs of a model.

    Attributes:
        instance: the private copy with the inputs.
        float64: the same in float64; None if the model does not run in float64.
    """

    instance: Instance
    float64: Instance | None

    @property
    def quantities(self) -> frozenset[Quantity]:
        """What is compared; no sum of the outputs, which may be zero by cancellation (over a batch norm)."""
        return ALL_QUANTITIES - {"output"} if self.name.endswith(EXPANDED) else ALL_QUANTITIES


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FileTrial(Trial):
    """Inputs of an ONNX graph, by name."""

    feeds: dict[str, Tensor]
