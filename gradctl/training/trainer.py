"""One training run on a private copy, part by part: what a variant of the training step replaces."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradctl.core.errors import TargetError, is_out_of_memory
from gradctl.core.names import buffer_name, parameter_name
from gradctl.forms.form import Outcome, named_tensors
from gradctl.numerics.measures import dense, norm
from gradctl.subject.frames import first_line, user_frames
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.training.recipe import TrainingRecipe, trained, unique

LOSS = "loss"


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """What one step computed.

    Attributes:
        outcome: the loss (``outputs``), gradients as they were when ``optimizer.step()`` was first entered, and the
            state after the step: parameters, state of the optimizer, buffers.
        updates: how many times ``optimizer.step()`` was called.
        loss_scale: the norm of the terms of the loss, which may cancel.
        draws: whether random numbers were drawn from torch's generator.
        is_renamed: whether it is of another model, whose buffers have partners as far as they have names there.
    """

    outcome: Outcome
    updates: int
    loss_scale: float
    draws: bool
    is_renamed: bool = False

    def kept(self) -> StepRecord:
        """Return the record with copies of the state, which the next step changes in place."""
        state = {name: tensor.clone() for name, tensor in self.outcome.state.items()}
        return replace(self, outcome=replace(self.outcome, state=state))


class Trainer:
    """A model, its optimizer, and the parts of a training step. A variant replaces some of them before the first step.

    Attributes:
        recipe: what is trained.
        instance: the private copy; ``instance.model`` is the model.
        is_float64: whether the copy is in float64; if not, it is in the native dtype.
        call: called with a batch, in place of the model.
        model: another one that is trained, whose buffers are state of the run; None: that of the instance.
        buffer_names: of buffers that have another name in the record; of a model with such, no others are recorded.
        parameters: the trained tensors by name, ``param:fc1.weight``; each has several tensors if it is tied.
        forward: from positional and keyword inputs to the loss.
        backward: of a loss.
        update: the step of the optimizer.
        step: the whole step, from positional and keyword inputs to the loss: zero_grad, forward, backward, update.
        before_step: called with the number of a step, from 0, before its inputs are made.
        number: of the present step, from 0.
        steps: how many the run has; known once it has begun.
        made_elsewhere: the records of this step and those after it, if another process makes them.
        context: entered around each step: the promotion to float64.
        notes: what the variant found out about itself, for the report.
        autocast: name of the dtype of ``torch.autocast`` around the model, if the user's step enters it.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        instance: Instance,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        is_float64: bool = False,
    ) -> None:
        self.recipe, self.instance, self.context, self.is_float64 = recipe, instance, context, is_float64
        instance.restore()  # not in run: it would put back what a variant has changed in modules
        self.call: Callable[..., Any] = instance.model
        self.model: Any = None
        self.buffer_names: Mapping[str, str] | None = None
        self.parameters = trained(instance)
        self.forward: Callable[..., Tensor] = self.plain_forward
        self.backward: Callable[[Tensor], None] = self.plain_backward
        self.update: Callable[[], None] = self.plain_update
        self.step: Callable[..., Tensor | None] = self.plain_step
        self.before_step: Callable[[int], None] = lambda number: None
        self.number, self.steps = 0, 0
        self.made_elsewhere: Iterator[StepRecord] | None = None
        self.scheduler: Any = None
        self.notes: list[str] = []
        self.autocast: str | None = None
        self.loss_name: str | None = None
        self._optimizer: Optimizer | None = None
        self._updates = 0
        self._gradients: dict[str, Tensor | None] = {}
        self._loss_scale = 0.0

    @property
    def module(self) -> nn.Module | None:
        """The model, if it is a module."""
        return module_of(self.instance.model if self.model is None else self.model)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, made at the first use from ``parameters``; gradients are recorded when it steps."""
        if self._optimizer is None:
            self.optimizer, self.scheduler = self.recipe.optimizer.make(unique(self.parameters))
        assert self._optimizer is not None
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self.record_update())

    def plain_step(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Make one step, and return the loss."""
        self.optimizer.zero_grad()
        loss = self.forward(*args, **kwargs)
        self.backward(loss)
        self.update()
        return loss

    def plain_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.loss_of(self.outputs(*args, **kwargs))

    def plain_backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        torch.autograd.backward(loss)

    def plain_update(self) -> None:
        """Call ``optimizer.step()``.

        Raises:
            TargetError: GC144 if the optimizer raises.
        """
        try:
            self.optimizer.step()
        except Exception as error:  # an optimizer of the user's may raise anything
            if is_out_of_memory(error):
                raise
            closure = " A step that takes a closure is not supported." if "closure" in str(error) else ""
            said = f"the optimizer {self.recipe.optimizer.name} raises in step(): {first_line(error)}.{closure}"
            raise TargetError("GC144", said, details=user_frames(error)) from error

    def outputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the tensors that the model returns for a batch, by name; of a model with ``--loss``, the loss."""
        return dict(self.instance.call_as_seeded(self.call, args, kwargs))

    def loss_of(self, outputs: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        """Return the loss of the outputs of a batch.

        Args:
            outputs: by name.
            rows: which rows of the batch they are, if they are those of a micro-batch: a loss that is the sum of all
                outputs with random weights has the weights of these rows. Any other loss is what the model returns.

        Raises:
            TargetError: GC113 if ``--loss`` returns no scalar, or nothing requires a gradient.
        """
        self.loss_name = name = self.recipe.loss_name(outputs)
        if name is not None:
            self._loss_scale = 0.0
            if not outputs[name].requires_grad:
                raise TargetError("GC113", "the loss requires no gradient: it depends on no parameter that is trained.")
            return outputs[name]
        terms = [self._weighted(key, t, rows) for key, t in outputs.items() if t.requires_grad]
        if not terms:
            raise TargetError("GC113", "no output requires a gradient, so that there is no loss to minimise.")
        self._loss_scale = sum(norm(each.detach()) for each in terms)
        return torch.stack([each.sum() for each in terms]).sum()

    def _weighted(self, name: str, output: Tensor, rows: slice | None) -> Tensor:
        if torch.isinf(output.detach()).any():  # masked logits; a NaN makes the loss one
            output = torch.where(torch.isinf(output), 0, output)
        weights = self.recipe.weights_of(self.number, name, output) if rows is None else None
        if weights is None:
            weights = self.recipe.weights[self.number, name][rows].to(output)
        product = output * weights
        return product.real if product.is_complex() else product

    def record_update(self) -> None:
        """Record the gradients, once a step: the optimizer's hook calls it, a step without that hook must."""
        self._updates += 1
        if self._updates == 1:
            self._gradients = {name: _gradient(tensors) for name, tensors in self.parameters.items()}

    def run(self, steps: int, start: int = 0) -> Iterator[StepRecord]:
        """Yield the record of each step from ``start`` on; a trainer runs once.

        Raises:
            Exception: whatever the model, the optimizer or the variant raises.
        """
        self.steps = steps
        try:
            yield from self._run(start)
        finally:
            if isinstance(self.made_elsewhere, Generator):  # it ends its processes
                self.made_elsewhere.close()

    def _run(self, start: int) -> Iterator[StepRecord]:
        for number in range(start, self.steps):
            self.number = number
            self.before_step(number)
            if self.made_elsewhere is not None:
                yield next(self.made_elsewhere)
                continue
            args, kwargs = self.recipe.batch(self.instance, self.number)
            self._updates, self._gradients = 0, {}
            seed_generators(self.recipe.subject.seed + self.number)
            seeded = torch.default_generator.get_state()
            with self.context():
                try:
                    loss = self.step(*args, **kwargs)
                except SystemExit as error:  # of the user's code; it must not end this program
                    raise RuntimeError(f"SystemExit: {error.code}") from error
                self._schedule(loss)
            if not self._updates:
                self._gradients = {name: _gradient(tensors) for name, tensors in self.parameters.items()}
            yield self._record(loss, draws=not torch.equal(seeded, torch.default_generator.get_state()))

    def _schedule(self, loss: Tensor | None) -> None:
        """Call ``scheduler.step()``, with the loss if it takes a metric; TargetError GC144 if it raises."""
        takes_loss = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        try:
            if self.scheduler is not None:
                self.scheduler.step(*([loss] if takes_loss else []))
        except Exception as error:  # a scheduler of the user's may raise anything
            if is_out_of_memory(error):
                raise
            said = f"the scheduler of the optimizer {self.recipe.optimizer.name} raises in step(): {first_line(error)}."
            needed = " It takes the loss, which the step must return." if takes_loss and loss is None else ""
            raise TargetError("GC144", said + needed, details=user_frames(error)) from error

    def _record(self, loss: Tensor | None, *, draws: bool) -> StepRecord:
        outputs = {LOSS: loss.detach().reshape(())} if loss is not None else {}
        scale = max(self._loss_scale, norm(loss.detach()) if loss is not None else 0.0)
        outcome = Outcome(outputs, self._gradients, self.state())
        return StepRecord(outcome, self._updates, scale, draws, self.buffer_names is not None)

    def state(self) -> dict[str, Tensor]:
        """Return parameters, state of the optimizer and buffers by name: the tensors themselves, no copies."""
        parameters = {name: tensors[0].detach() for name, tensors in self.parameters.items()}
        parameters |= self._untrained()
        buffers = {buffer_name(name): each.detach() for name, each in named_tensors(self.module)[1].items()}
        if self.buffer_names is not None:
            buffers = {self.buffer_names[name]: each for name, each in buffers.items() if name in self.buffer_names}
        return {**parameters, **self._optimizer_state(), **buffers}

    def _untrained(self) -> dict[str, Tensor]:
        """Return frozen parameters, which no step changes, and those that a step has put in place of trained ones."""
        if self.module is None or self.buffer_names is not None:
            return {}
        known = {id(tensor) for leaf in self.instance.leaves for tensor in leaf.sharing}
        found = self.module.named_parameters()
        return {parameter_name(name): each.detach() for name, each in found if id(each) not in known}

    def _optimizer_state(self) -> dict[str, Tensor]:
        names = {
            id(tensor): name.removeprefix("param:") + (f"~{number}" if number else "")
            for name, tensors in self.parameters.items()
            for number, tensor in enumerate(tensors)
        }
        found: dict[str, Tensor] = {}
        for tensor, state in self.optimizer.state.items():
            for key, value in state.items() if id(tensor) in names else ():
                if isinstance(value, Tensor | int | float):
                    found[f"optimizer:{key}.{names[id(tensor)]}"] = torch.as_tensor(value).detach().to_dense()
        for number, group in enumerate(self.optimizer.param_groups):
            suffix = f".{number}" if len(self.optimizer.param_groups) > 1 else ""
            found[f"optimizer:lr{suffix}"] = torch.as_tensor(group.get("lr", 0.0), dtype=torch.float64)
        return found


def _gradient(tensors: tuple[Tensor, ...]) -> Tensor | None:
    """Return a copy of the gradient of one storage, dense, summed over tied tensors."""
    found = [dense(each.grad) for each in tensors]
    present = [each.detach() for each in found if each is not None]
    if not present:
        return None
    return present[0].clone() if len(present) == 1 else torch.stack(present).sum(0)
