"""Recurrent layers in a joint graph: one Scan over the steps forward and one backward, of any number of steps.

torch traces a layer as the nodes of every step, and its kernel for that loses the dropout between layers (torch 2.13,
``_rnn_helper``). Operations that do not depend on the step before stay outside of the Scan: the products with the
inputs, and the gradients of weights, each one product over all steps.

Sources: Cho et al. 2014, arXiv 1406.1078, in the form of cuDNN (bias inside the reset); Hochreiter and Schmidhuber,
Neural Computation 1997, with the projection of Sak et al. 2014, arXiv 1402.1128; gradients by the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from gradctl.subject.torch_private import scan
from gradctl.tracing.linear_map import is_differentiable

_Tensors = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One step on tensors ``[batch, width]``; states are the output of the cell, and its memory in an LSTM."""

    # From gates of the input, gates of the hidden state and the states, to the states and the values that are saved.
    step: Callable[[Tensor, Tensor, _Tensors], tuple[_Tensors, _Tensors]]
    # From gradients of the states, the last of the states before, and the saved values, to the gradients of both kinds
    # of gates, and of the last of the states before, except through its gates.
    back: Callable[[_Tensors, Tensor, _Tensors], tuple[Tensor, Tensor, Tensor]]


def _split(gates: Tensor, count: int) -> _Tensors:
    """Return parts of equal width; torch.onnx (2.13) has no ``chunk`` in the body of a Scan."""
    width = gates.shape[-1] // count
    return [gates.narrow(-1, place * width, width) for place in range(count)]


def _gru_step(given: Tensor, hidden: Tensor, states: _Tensors) -> tuple[_Tensors, _Tensors]:
    given_reset, given_update, given_new = _split(given, 3)
    reset, update, hidden_new = _split(hidden, 3)
    reset, update = (reset + given_reset).sigmoid(), (update + given_update).sigmoid()
    new = (given_new + hidden_new * reset).tanh()
    return [(states[0] - new) * update + new], [reset, update, new, hidden_new]


def _gru_back(slopes: _Tensors, before: Tensor, kept: _Tensors) -> tuple[Tensor, Tensor, Tensor]:
    (slope,), (reset, update, new, hidden_new) = slopes, kept
    by_new = slope * (1 - update) * (1 - new * new)
    by_update = slope * (before - new) * update * (1 - update)
    by_reset = by_new * hidden_new * reset * (1 - reset)
    given = torch.cat([by_reset, by_update, by_new], -1)
    return given, torch.cat([by_reset, by_update, by_new * reset], -1), slope * update


def _lstm_step(given: Tensor, hidden: Tensor, states: _Tensors) -> tuple[_Tensors, _Tensors]:
    into, forget, cell, out = _split(given + hidden, 4)
    into, forget, cell, out = into.sigmoid(), forget.sigmoid(), cell.tanh(), out.sigmoid()
    memory = forget * states[1] + into * cell
    shown = memory.tanh()
    return [out * shown, memory], [into, forget, cell, out, shown]


def _lstm_back(slopes: _Tensors, before: Tensor, kept: _Tensors) -> tuple[Tensor, Tensor, Tensor]:
    (slope, by_memory), (into, forget, cell, out, shown) = slopes, kept
    by_memory = by_memory + slope * out * (1 - shown * shown)
    gates = [
        by_memory * cell * into * (1 - into),
        by_memory * before * forget * (1 - forget),
        by_memory * into * (1 - cell * cell),
        slope * shown * out * (1 - out),
    ]
    joined = torch.cat(gates, -1)
    return joined, joined, by_memory * forget


def _plain(activation: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> _Cell:
    def step(given: Tensor, hidden: Tensor, states: _Tensors) -> tuple[_Tensors, _Tensors]:
        output = activation(given + hidden)
        return [output], [output]

    def back(slopes: _Tensors, before: Tensor, kept: _Tensors) -> tuple[Tensor, Tensor, Tensor]:
        gates = slopes[0] * slope(kept[0])
        return gates, gates, torch.zeros_like(before)

    return _Cell(step, back)


_CELLS = {
    torch.gru: _Cell(_gru_step, _gru_back),
    torch.lstm: _Cell(_lstm_step, _lstm_back),
    torch.rnn_tanh: _plain(torch.tanh, lambda output: 1 - output * output),
    torch.rnn_relu: _plain(torch.relu, lambda output: (output > 0).to(output.dtype)),
}


class _Steps(torch.autograd.Function):
    """All steps of one direction of one layer.

    From gates of the inputs ``[time, batch, gates]``, weight ``[gates, width]``, bias and projection or None, and the
    states before, to the outputs ``[time, batch, width]`` and the states after.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        cell: _Cell,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Tensor | None,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(states)

        def step(*values: Tensor) -> list[Tensor]:
            weights = iter(values[count + 1 :])
            placed = [None if each is None else next(weights) for each in (weight, bias, projection)]
            before = values[:count]
            after, kept = _step(cell, values[count], before, placed)
            return [each.clone() for each in (*after, after[0], *before, *kept)]

        weights = tuple(each for each in (weight, bias, projection) if each is not None)
        found = scan(step, list(states), [given], weights)
        after, outputs, rest = found[:count], found[count], found[count + 1 :]
        ctx.cell, ctx.count = cell, count
        ctx.save_for_backward(given, weight, bias, projection, *states, *rest)
        return outputs, *after

    @staticmethod
    def backward(ctx: Any, by_outputs: Tensor, *by_after: Tensor) -> Any:
        cell, count = ctx.cell, ctx.count
        given, weight, bias, projection, *others = ctx.saved_tensors
        states, before, kept = others[:count], others[count : 2 * count], others[2 * count :]
        if torch.is_grad_enabled():  # a second derivative follows, which a Scan does not have
            return None, *_differentiable(cell, [given, weight, bias, projection, *states], (by_outputs, *by_after))

        def step(*values: Tensor) -> list[Tensor]:
            by_states, by_output, last, rest = list(values[:count]), *values[count : count + 2], values[count + 2 :]
            kept_now, (weight, *projections) = rest[: len(kept)], rest[len(kept) :]
            by_shown = by_states[0] + by_output
            by_cell = by_shown @ projections[0] if projections else by_shown
            by_given, by_gates, by_last = cell.back([by_cell, *by_states[1:]], last, kept_now)
            by_hidden = by_gates @ weight
            by_before = [by_hidden + by_last] if count == 1 else [by_hidden, by_last]
            return [each.clone() for each in (*by_before, by_given, by_gates, by_shown)]

        weights = (weight,) if projection is None else (weight, projection)
        found = scan(step, list(by_after), [each.flip(0) for each in (by_outputs, before[-1], *kept)], weights)
        by_given, by_gates, by_shown = (each.flip(0) for each in found[count:])
        rows = by_gates.flatten(0, 1)
        by_bias = None if bias is None else rows.sum(0)
        by_projection = None
        if projection is not None:
            out, shown = kept[-2:]
            by_projection = by_shown.flatten(0, 1).T @ (out * shown).flatten(0, 1)
        return None, by_given, rows.T @ before[0].flatten(0, 1), by_bias, by_projection, *found[:count]


def _step(cell: _Cell, given: Tensor, states: _Tensors, weights: Sequence[Tensor | None]) -> tuple[_Tensors, _Tensors]:
    """Return the states after one step, and the values saved for its backward."""
    weight, bias, projection = weights
    assert weight is not None
    (output, *memory), kept = cell.step(given, linear(states[0], weight, bias), states)
    return [output if projection is None else linear(output, projection), *memory], kept


def _differentiable(cell: _Cell, inputs: Sequence[Tensor | None], slopes: _Tensors) -> list[Tensor | None]:
    """Return the gradients by the inputs of ``_Steps``, as operators that can be differentiated."""
    given, *weights = inputs[:4]
    assert given is not None
    after: _Tensors = [each for each in inputs[4:] if each is not None]
    outputs = []
    for each in given:
        after, _ = _step(cell, each, after, weights)
        outputs.append(after[0])
    leaves = list(filter(is_differentiable, inputs))
    found = iter(torch.autograd.grad([torch.stack(outputs), *after], leaves, slopes, create_graph=True))
    return [next(found) if is_differentiable(each) else None for each in inputs]


class ScannedLayers(TorchFunctionMode):
    """Run recurrent layers of some kinds, for example ``torch.gru``, as Scans; packed sequences are left to torch."""

    def __init__(self, functions: Collection[Any] = _CELLS.keys()) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_scanned = func in self.functions
        if not is_scanned or isinstance(args[1 if func is torch.lstm else 2], Tensor):  # batch sizes: a packed sequence
            return func(*args, **(kwargs or {}))
        return _layers(_CELLS[func], *args, **(kwargs or {}))


def _layers(  # noqa: PLR0917 as torch.gru
    cell: _Cell,
    input: Tensor,
    hx: Tensor | _Tensors,
    params: _Tensors,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Return the outputs and the states after, as ``torch.gru`` and others do."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if bidirectional else 1
    of_each = len(params) // (num_layers * directions)
    outputs = input.transpose(0, 1) if batch_first else input
    finals: list[Sequence[Tensor]] = []
    for layer in range(num_layers):
        found = []
        for direction in range(directions):
            place = layer * directions + direction
            weights, before = params[place * of_each : (place + 1) * of_each], [each[place] for each in states]
            out, *after = _direction(cell, outputs, before, weights, has_biases, is_reverse=direction == 1)
            found.append(out)
            finals.append(after)
        outputs = torch.cat(found, -1) if bidirectional else found[0]
        if dropout and train and layer < num_layers - 1:
            outputs = torch.dropout(outputs, dropout, train=True)
    return outputs.transpose(0, 1) if batch_first else outputs, *map(torch.stack, zip(*finals, strict=True))


def _direction(
    cell: _Cell, input: Tensor, states: _Tensors, params: _Tensors, has_biases: bool, *, is_reverse: bool
) -> tuple[Tensor, ...]:
    """Return the outputs of one direction of a layer ``[time, batch, width]``, and the states after."""
    by_input, by_hidden, *rest = params
    input_bias, bias = rest[:2] if has_biases else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    given = linear(input, by_input, input_bias)
    given = given.flip(0) if is_reverse else given
    out, *after = _Steps.apply(cell, given, by_hidden, bias, projection, *states)  # type: ignore[no-untyped-call]
    return out.flip(0) if is_reverse else out, *after
