"""Trials: sets of inputs, and the outcomes of the reference on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gradctl.forms.form import Outcome
from gradctl.subject.instance import Instance


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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ModelTrial(Trial):
    """Inputs of a model.

    Attributes:
        instance: the private copy with the inputs.
        float64: the same in float64; None if the model does not run in float64.
    """

    instance: Instance
    float64: Instance | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FileTrial(Trial):
    """Inputs of an ONNX graph, by name."""

    feeds: dict[str, Tensor]
