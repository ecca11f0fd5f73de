"""Programs that can be compared with a reference: a static form, altered eager, or an ONNX file.

A run is three calls in a row, from the same state and seed, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from gradctl.comparison.trials import AFTER_EXAMPLE, NO_GRAD, FileTrial, ModelTrial, Trial
from gradctl.core.errors import is_out_of_memory
from gradctl.core.names import Quantity, buffer_name, input_name, output_name
from gradctl.forms import eager
from gradctl.forms.form import Captured, Outcome, take_gradient
from gradctl.numerics.measures import gaussian_like, same_values
from gradctl.onnxio.session import run
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.state import State
from gradctl.subject.subject import Subject

# TorchScript's own autodiff starts at the second or third call, and state that is not put back accumulates.
CALLS = 3
T_contra = TypeVar("T_contra", bound=Trial, contravariant=True)
# From outputs by name and the subject's seed to the cotangent of each float output.
Cotangents = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]


class Program(Protocol[T_contra]):
    """A program that is compared: it has a name and quantities, and runs on the inputs of a trial."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def quantities(self) -> frozenset[Quantity]:
        """The quantities that can be compared."""

    def run(self, trial: T_contra, calls: int = CALLS) -> list[Outcome]:
        """Return the outcomes of some calls in a row; after one that raised there is no other."""


@dataclass(slots=True, eq=False)
class FormProgram:
    """A captured form, run from the state in which it was captured.

    Attributes:
        captured: the form.
        state: of the form as it was captured; put back before each run.
        is_float64: whether it runs on the float64 copy of a trial.
        context: entered around each call and its backward.
    """

    captured: Captured
    state: State = field(init=False)
    is_float64: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.state = State([self.captured.model])

    @property
    def name(self) -> str:
        """The name of the form."""
        return self.captured.form

    @property
    def quantities(self) -> frozenset[Quantity]:
        """The quantities that the form has."""
        return self.captured.quantities

    def run(
        self, trial: ModelTrial, calls: int = CALLS, *, differentiable: frozenset[str] | None = None
    ) -> list[Outcome]:
        """Return the outcomes of some calls in a row.

        Args:
            trial: the inputs.
            calls: how many.
            differentiable: the outputs that get a cotangent; by default those that require a gradient in eager.
        """
        instance = trial.float64 if self.is_float64 else trial.instance
        assert instance is not None
        asked = trial.native[0].differentiable if differentiable is None else differentiable
        return run_calls(self.captured, instance, self.state, differentiable=asked, calls=calls, context=self.context)


@dataclass(slots=True, eq=False)
class FileProgram:
    """An ONNX file in a session.

    Attributes:
        name: what messages call it.
        session: of onnxruntime.
        feeds: the reference's name of each input, if they differ.
        outputs: the file's name of each output of the reference, if they differ.
    """

    name: str
    session: onnxruntime.InferenceSession
    feeds: Mapping[str, str] | None = None
    outputs: Mapping[str, str] | None = None
    quantities: frozenset[Quantity] = frozenset({"output"})

    def run(self, trial: FileTrial, calls: int = 1) -> list[Outcome]:
        """Return the outcome of one call: a session has no state."""
        return [self.outcome(trial.feeds)]

    def outcome(self, feeds: Mapping[str, Tensor]) -> Outcome:
        """Return the outputs for inputs by their names in the reference, or the error."""
        own = feeds if self.feeds is None else {name: feeds[other] for name, other in self.feeds.items()}
        try:
            found = run(self.session, own)
        except RuntimeError as error:
            return Outcome(error=error)
        return Outcome(found if self.outputs is None else {name: found[own] for name, own in self.outputs.items()})


def run_calls(
    captured: Captured,
    instance: Instance,
    state: State,
    *,
    differentiable: frozenset[str] | None = None,
    calls: int = CALLS,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    is_recorded: bool = True,
    with_numbers: bool = False,
    cotangents: Cotangents | None = None,
) -> list[Outcome]:
    """Return the outcomes of calls in a row; after one that raised there is no other.

    Args:
        captured: the form to run.
        instance: where the inputs come from.
        state: of the form, put back before the first call.
        differentiable: outputs that get a cotangent; None: each that requires a gradient.
        calls: how many in a row.
        context: entered around each call and its backward.
        is_recorded: whether autograd records the calls.
        with_numbers: whether Python's numbers are outputs, too.
        cotangents: of the outputs; by default ``cotangents_of``.
    """
    instance.restore()
    state.restore()
    found = []
    for _ in range(calls):
        try:
            found.append(
                _one_call(
                    captured,
                    instance,
                    differentiable,
                    context,
                    cotangents or cotangents_of,
                    is_recorded=is_recorded,
                    with_numbers=with_numbers,
                )
            )
        except Exception as error:  # the form or the user's model may raise anything
            if is_out_of_memory(error):
                raise
            found.append(Outcome(error=error))
            break
    _take_gradients(instance, captured)
    return found


def run_copy(
    trial: str,
    subject: Subject,
    example: Subject,
    *,
    promoted: bool,
    input_mode: InputMode,
    calls: int,
    context: Callable[[], AbstractContextManager[Any]],
    differentiable: frozenset[str] | None = None,
    with_numbers: bool = False,
    moved_by: int | None = None,
    cotangents: Cotangents | None = None,
) -> tuple[Instance, list[Outcome]]:
    """Return a new private copy of a model, hooks and all, and the outcomes of calls in a row on one trial.

    Args:
        trial: its name, by which a model runs without gradients, or after a call on the example.
        subject: the model on the inputs of the trial.
        example: the model on the inputs of the example.
        promoted: whether it runs in float64.
        input_mode: how the model takes float inputs.
        calls, context, differentiable, with_numbers: as in ``run_calls``.
        moved_by: a seed: weights, buffers and inputs are moved by one ULP up or down, which shows the noise of a run.
        cotangents: of the outputs; by default ``cotangents_of``.
    """
    is_recorded = trial != NO_GRAD
    mode = input_mode if is_recorded else "constant"
    instance = Instance(subject, promoted=promoted, input_mode=mode, keep_hooks=True)
    if moved_by is not None:
        instance.move_by_ulp(moved_by)
    captured = eager.capture(instance)
    if trial == AFTER_EXAMPLE:
        captured = _run_before(captured, Instance(example, promoted=promoted, input_mode=mode))
    found = run_calls(
        captured,
        instance,
        State([]),
        differentiable=differentiable,
        calls=calls,
        context=context,
        is_recorded=is_recorded,
        with_numbers=with_numbers,
        cotangents=cotangents,
    )
    return instance, found


def _run_before(captured: Captured, other: Instance) -> Captured:
    """Return a form each of whose calls follows a call on the inputs of another instance."""

    def call(*args: Any, **kwargs: Any) -> Any:
        other_args, other_kwargs = other.inputs()
        captured.call(*other_args, **other_kwargs)
        return captured.call(*args, **kwargs)

    return replace(captured, call=call)


def _one_call(
    captured: Captured,
    instance: Instance,
    differentiable: frozenset[str] | None,
    context: Callable[[], AbstractContextManager[Any]],
    draw_cotangents: Cotangents,
    *,
    is_recorded: bool,
    with_numbers: bool,
) -> Outcome:
    _take_gradients(instance, captured)
    args, kwargs = instance.inputs()
    given = _named(instance, args, kwargs)
    before = _copies(given)
    with context(), torch.set_grad_enabled(is_recorded):
        outputs = dict(instance.call(captured.call, args, kwargs))
        if with_numbers:
            outputs |= dict(_numbers(instance.closed_outputs))
    requiring = [name for name, t in outputs.items() if t.requires_grad and is_recorded]
    # Drawn outside the context: under the promotion random numbers are drawn in the native dtype, and are others.
    cotangents = draw_cotangents(outputs, instance.subject.seed)
    asked = [name for name in requiring if differentiable is None or name in differentiable]
    if asked:
        with context():
            torch.autograd.backward([outputs[name] for name in asked], [cotangents[name] for name in asked])
    buffers = {buffer_name(name): buffer for name, buffer in captured.buffers_now().items()}
    state = _copies({**buffers, **_changed(given, before)})
    return Outcome(_copies(outputs), _take_gradients(instance, captured), state, frozenset(requiring))


def _numbers(outputs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield Python's and numpy's numbers among the outputs as tensors, Python's floats in the default dtype."""
    for path, value in outputs:
        if isinstance(value, float | complex | np.number) or (isinstance(value, int) and abs(value) < 2**63):
            yield output_name(path), torch.tensor(value)


def _take_gradients(instance: Instance, captured: Captured) -> dict[str, Tensor | None]:
    return {leaf.name: take_gradient(leaf, captured) for leaf in instance.leaves}


def _changed(given: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in given.items() if not same_values(before[name], tensor.detach())}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def cotangents_of(outputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a Gaussian cotangent for each float output, the same in every form and dtype, whatever their order."""
    generator = torch.Generator().manual_seed(seed)
    floats = {name: t.detach() for name, t in sorted(outputs.items()) if t.is_floating_point() or t.is_complex()}
    doubles = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in floats.items()}
    return {name: gaussian_like(doubles[name], generator).to(t.dtype) for name, t in floats.items()}


def _named(instance: Instance, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    named = input_names(instance.subject.model, args, kwargs)
    return {input_name(name): value for name, value in named if isinstance(value, Tensor)}
