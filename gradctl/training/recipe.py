"""What is trained, on which batches, for which loss, with which optimizer: the same for the plain step and variants."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.aliasing import clone_as_laid_out
from gradctl.subject.inputs.variations import draw_inputs
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves, map_leaves
from gradctl.training.optimizers import OptimizerChoice

# Between the seeds of runs on fresh batches, more than there are steps.
_FRESH = 100_003
_WEIGHTED = "sum of all outputs with random weights"


@dataclass(slots=True, eq=False)
class TrainingRecipe:
    """A training run, apart from the values that it computes.

    Attributes:
        subject: the model and its example; not changed.
        optimizer: makes the optimizer of each run.
        input_mode: how the model takes float inputs; as constants unless the user's require a gradient.
        on_example: the steps that run on the example, because the loss on drawn inputs is not finite.
        weights: of the outputs in a loss that is their weighted sum, by step and name, in float64.
        loading: how a new process loads the subject; None if it cannot.
    """

    subject: Subject
    optimizer: OptimizerChoice
    input_mode: InputMode = "constant"
    on_example: set[int] = field(default_factory=set)
    weights: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    loading: TargetOptions | None = None
    _drawn: dict[int, Subject] = field(default_factory=dict)

    def fresh(self, number: int) -> TrainingRecipe:
        """Return the same recipe on other batches and seeds; ``number`` is from 1."""
        drawn = draw_inputs(self.subject, self.subject.seed + _FRESH * number)
        return TrainingRecipe(replace(drawn, seed=drawn.seed + _FRESH * number), self.optimizer, self.input_mode)

    def instance(self, *, promoted: bool, moved: tuple[int, float | None] | None = None) -> Instance:
        """Return a new private copy of the model, hooks and all.

        Args:
            promoted: whether it is in float64.
            moved: a seed, and the part by which weights, buffers and inputs are moved (None: one ULP).
        """
        instance = Instance(self.subject, promoted=promoted, input_mode=self.input_mode, keep_hooks=True)
        if moved is not None:
            instance.move_by_ulp(*moved)
        return instance

    def batch(self, instance: Instance, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of a step, from 0: of the first the example, else random inputs like it.

        Their dtypes and strides are those of the instance's own inputs, which are fresh copies for each call.
        """
        given = instance.inputs()
        if step in self.on_example or step == 0:
            return given
        drawn = iter(leaves((self.subject_of(step).args, self.subject_of(step).kwargs)))

        def replaced(_: str, leaf: object) -> object:
            _, value = next(drawn)
            if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or not isinstance(value, Tensor):
                return leaf
            return clone_as_laid_out(value.detach(), leaf.dtype).requires_grad_(leaf.requires_grad)

        args, kwargs = map_leaves(replaced, given)
        return args, kwargs

    def subject_of(self, step: int) -> Subject:
        """Return the subject with the random inputs of a step."""
        if step not in self._drawn:
            self._drawn[step] = draw_inputs(self.subject, self.subject.seed + step)
        return self._drawn[step]

    def loss_name(self, outputs: Mapping[str, Tensor]) -> str | None:
        """Return the name of the output that is the loss; None if it is the weighted sum of all outputs.

        The loss is the result of ``--loss``, the only output if it is a scalar, or an output that is named ``loss``.

        Raises:
            TargetError: GC113 if ``--loss`` returns something else than one scalar.
        """
        name = "output.loss" if "output.loss" in outputs else next(iter(outputs))
        found = outputs[name]
        is_scalar = found.numel() == 1 and found.is_floating_point()
        if self.subject.loss is not None and (len(outputs) != 1 or not is_scalar):
            shapes = " and ".join(f"{each.dtype}{list(each.shape)}".removeprefix("torch.") for each in outputs.values())
            raise TargetError("GC113", f"the loss returns {shapes}, not a float scalar; end it in a sum or mean.")
        return name if is_scalar and (len(outputs) == 1 or name == "output.loss") else None

    def weights_of(self, step: int, name: str, output: Tensor) -> Tensor:
        """Return the Gaussian weights of an output in the loss of a step: the same in each run, of its dtype."""
        key = (step, name)
        if key not in self.weights:
            # numpy's generator: under the promotion, torch's operators draw in the native dtype, and other numbers.
            state = np.random.RandomState((self.subject.seed + step + zlib.crc32(name.encode())) % 2**32)
            self.weights[key] = torch.from_numpy(np.asarray(state.standard_normal(tuple(output.shape))))
        return self.weights[key].to(output)

    def describe_loss(self, name: str | None) -> str:
        """Return what messages call the loss."""
        if name is None:
            return _WEIGHTED
        return getattr(self.subject.loss, "__name__", "loss") if self.subject.loss is not None else name


def trained(instance: Instance) -> dict[str, tuple[Tensor, ...]]:
    """Return the tensors that are trained, by name: those that collect the gradient of one storage under one name."""
    return {leaf.name: leaf.sharing for leaf in instance.leaves if not leaf.name.startswith("input:")}


def unique(tensors: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """Return each tensor once, in order."""
    return list({id(each): each for group in tensors.values() for each in group}.values())
