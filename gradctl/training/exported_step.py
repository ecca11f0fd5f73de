"""A training step in an ONNX file: made from a model and its optimizer, and run like the plain step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from gradctl.core.errors import TargetError
from gradctl.core.names import buffer_name, parameter_name
from gradctl.forms.form import CannotCapture, Captured, Outcome
from gradctl.forms.joint_call import run_eagerly
from gradctl.forms.onnx.train_step import METADATA, export_graph
from gradctl.joint.export_error import JointExportError
from gradctl.joint.optimizer_update import LEARNING_RATE, NEXT, STEP, OptimizerUpdate
from gradctl.joint.random_inputs import RandomInput
from gradctl.onnxio.onnx_file import OnnxFile, session
from gradctl.onnxio.session import run
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.loss_function import include_loss
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.training.plain_runs import PlainRuns, PlainStep
from gradctl.training.recipe import TrainingRecipe, unique
from gradctl.training.trainer import LOSS, StepRecord, Trainer


def clip_gradients(trainer: Trainer, clip_norm: float | None) -> None:
    """Let the plain step clip the norm of all gradients together before the optimizer's step."""
    if clip_norm is None:
        return

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(unique(trainer.parameters), clip_norm)
        trainer.plain_update()

    trainer.update = update


def export_step(
    runs: PlainRuns, *, clip_norm: float | None = None, keeps_gradients: bool = False, **options: Any
) -> tuple[Captured, dict[str, Tensor]]:
    """Return the training step in a graph, and the first value of each input: state, example, random numbers.

    Args:
        runs: the plain steps, already run.
        clip_norm, keeps_gradients: as of ``OptimizerUpdate``.
        options: ``opset`` and ``dynamic``, as of the joint graph.

    Raises:
        CannotCapture: the model, its loss or its optimizer has no such graph.
        TargetError: GC113 if there is no loss; GC104 as for the joint graph.
    """
    trainer = runs.trainer("native")
    record = next(trainer.run(1))
    if trainer.loss_name is None:
        raise TargetError(
            "GC113",
            f"{runs.recipe.subject.target} returns no scalar to minimise. Add --loss NAME, a function of the outputs "
            "beside the target.",
        )
    instance = _joint_instance(runs.recipe)
    module = module_of(instance.model)
    registered = dict(module.named_parameters()) if module is not None else {}
    names = _names_by_identity(trainer, record, registered)
    try:
        settings: dict[str, Any] = {"clip_norm": clip_norm, "keeps_gradients": keeps_gradients}
        update = OptimizerUpdate.of(trainer.optimizer, names, trainer.loss_name, **settings)
    except JointExportError as refusal:
        raise CannotCapture(str(refusal)) from refusal
    captured = export_graph(instance, update, **options)
    buffers = dict(module.named_buffers()) if module is not None else {}
    args, kwargs = instance.inputs()
    batch = _batch(instance, args, kwargs)
    _, draws = run_eagerly(instance, args, kwargs)
    return captured, {**registered, **buffers, **update.state(registered), **batch, **_drawn(draws)}


def _joint_instance(recipe: TrainingRecipe) -> Instance:
    return Instance(include_loss(recipe.subject), input_mode=recipe.input_mode, keep_hooks=True)


def _names_by_identity(trainer: Trainer, record: StepRecord, registered: Mapping[str, Tensor]) -> dict[int, str]:
    """Return the names of the parameters that have a gradient, by identity.

    Raises:
        CannotCapture: a trained tensor is no parameter of the module, or shares the memory of another one.
    """
    names = {}
    for name, tensors in trainer.parameters.items():
        own = name.removeprefix("param:")
        if record.outcome.gradients.get(name) is None:
            continue
        if len(tensors) > 1 or own not in registered:
            reason = "shares its memory with another tensor" if len(tensors) > 1 else "is no parameter of the module"
            raise CannotCapture(f"{name} is trained and {reason}: register one nn.Parameter, and use it twice.")
        names[id(tensors[0])] = own
    return names


@dataclass(frozen=True, slots=True, eq=False)
class ExportedStep:
    """A training step in a file, and how its inputs are made.

    Attributes:
        session: of onnxruntime.
        recipe: the batches and seeds.
        instance: a private copy of the model, for inputs and random numbers.
        feeds: which output is which input of the next step.
        draws: whether some of its inputs are random numbers of the model.
    """

    session: onnxruntime.InferenceSession
    recipe: TrainingRecipe
    instance: Instance
    feeds: Mapping[str, str]
    draws: bool

    @classmethod
    def of_file(cls, file: OnnxFile, recipe: TrainingRecipe) -> ExportedStep:
        """Return the step in a file."""
        metadata = {each.key: each.value for each in file.model.metadata_props}
        described = json.loads(metadata[METADATA])
        instance = _joint_instance(recipe)
        running = session(file, provider=instance.subject.provider)
        return cls(running, recipe, instance, described["feeds"], bool(described["random"]))

    def from_plain(
        self, initial: Mapping[str, Tensor], plain: Sequence[PlainStep], start: int = 0
    ) -> Iterator[StepRecord]:
        """Yield the record of each step, made from the state that the plain step before left: errors do not add up.

        Args:
            initial: the first value of each input.
            plain: the plain steps.
            start: the number of the first step, from 0.
        """
        for number, values in enumerate(self._states(initial, plain)):
            if number >= start:
                yield self._record(values, self._run(number, values), plain[number])

    def in_a_row(
        self, initial: Mapping[str, Tensor], plain: Sequence[PlainStep], start: int = 0
    ) -> Iterator[StepRecord]:
        """Yield the record of each step, made from the state that the step before left; learning rates as torch's.

        Arguments as of ``from_plain``; the first step begins with the state of the plain step before.
        """
        own: dict[str, Tensor] = {}
        for number, values in enumerate(self._states(initial, plain)):
            if number >= start:
                now = {**values, **own}
                found = self._run(number, now)
                own = {name: found[output] for output, name in self.feeds.items()}
                yield self._record(now, found, plain[number])

    def _states(self, initial: Mapping[str, Tensor], plain: Sequence[PlainStep]) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of the plain steps that are state, by name."""
        yield dict(initial)
        for number, step in enumerate(plain[:-1], 1):
            state = step.record.outcome.state
            values = {name: state[parameter_name(name)] for name in initial if parameter_name(name) in state}
            values |= {name: state[buffer_name(name)] for name in initial if buffer_name(name) in state}
            values |= {name: state[f"optimizer:{name}"] for name in initial if f"optimizer:{name}" in state}
            rate = state.get("optimizer:lr", state.get("optimizer:lr.0"))
            assert rate is not None
            scalars = {STEP: torch.tensor(number), LEARNING_RATE: rate.to(initial[LEARNING_RATE].dtype)}
            yield {**initial, **values, **scalars}

    def _run(self, number: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        args, kwargs = self.recipe.batch(self.instance, number)
        feeds = _batch(self.instance, args, kwargs)
        if self.draws:
            seed = self.recipe.subject.seed + number
            seed_generators(seed)
            _, draws = run_eagerly(self.instance, args, kwargs)
            seed_generators(seed)
            feeds |= _drawn(draws)
        wanted = [each.name for each in self.session.get_inputs()]
        return run(self.session, {name: {**values, **feeds}[name].detach() for name in wanted})

    def _record(self, values: Mapping[str, Tensor], found: Mapping[str, Tensor], plain: PlainStep) -> StepRecord:
        """Return the results of a step on ``values`` under the names of the plain step."""
        expected = plain.record.outcome
        state = {name: _state(name, each, values, found) for name, each in expected.state.items()}
        outputs = {name: f"grad.{name.removeprefix('param:')}" for name in expected.gradients}
        gradients: dict[str, Tensor | None] = {name: found[each] for name, each in outputs.items() if each in found}
        return replace(plain.record, outcome=Outcome({LOSS: found[LOSS].reshape(())}, gradients, state))


def _state(name: str, plain: Tensor, values: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Tensor:
    """Return a parameter, buffer or state after a step; one for which the graph has no next value is as it was."""
    kind, _, own = name.partition(":")
    if kind != "optimizer":
        return found.get(f"{NEXT}{own}", values[own])
    if own.startswith(f"{STEP}."):
        return found[f"{NEXT}{STEP}"].to(plain.dtype)
    # The learning rate is an input, whose schedule is the caller's.
    return plain if own.partition(".")[0] == "lr" else found.get(f"{NEXT}{own}", values[own])


def _batch(instance: Instance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    given = input_names(instance.subject.model, args, kwargs)
    return {f"input.{name}": value for name, value in given if isinstance(value, Tensor)}


def _drawn(draws: Mapping[str, RandomInput]) -> dict[str, Tensor]:
    return {name: draw.again() for name, draw in draws.items()}
