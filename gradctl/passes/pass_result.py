"""A pass and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from gradctl.core.errors import listed
from gradctl.graphdiff.graph_view import operators

_MOST_OPERATORS = 6


class NotApplicable(Exception):
    """A pass does not apply to a graph; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class PassResult:
    """The result of a pass.

    Attributes:
        model: the graph after the pass.
        modified: whether it differs from the graph before, whatever the backend reports.
        changed: the differences in operators and initializers.
    """

    model: onnx.ModelProto
    modified: bool
    changed: str


@dataclass(frozen=True, slots=True)
class Pass:
    """One row of the table.

    Attributes:
        name: the value of ``--pass``.
        level: the lowest level that includes it; None if only ``--pass`` or an option of its own selects it.
        backend: the package that implements it.
        does: one line.
        apply: returns a new model for a model, which it does not change.
        missing: returns why it is not available, or "".
        tied_to_machine: whether its result fits only the processor on which it was made.
        may_grow: whether its result is kept even if it has more nodes.
    """

    name: str
    level: str | None
    backend: str
    does: str
    apply: Callable[[onnx.ModelProto], onnx.ModelProto]
    missing: Callable[[], str] = lambda: ""
    tied_to_machine: bool = False
    may_grow: bool = False


def compare_models(before: onnx.ModelProto, after: onnx.ModelProto) -> PassResult:
    """Return the result of a pass by its input and output."""
    same = _content(before) == _content(after) and all(
        _values(left) == _values(right)
        for left, right in zip(before.graph.initializer, after.graph.initializer, strict=True)
    )
    return PassResult(after, not same, "" if same else difference(before, after))


def difference(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """Return ``MatMul 4 to 0, Gemm 0 to 4; initializers 9 to 8``."""
    old, new = operators(before), operators(after)
    counts = [(kind, old.get(kind, 0), new.get(kind, 0)) for kind in sorted({*old, *new})]
    counts.sort(key=lambda each: -abs(each[2] - each[1]))
    changes = [f"{kind} {one} to {other}" for kind, one, other in counts if one != other]
    parts = [listed(changes, _MOST_OPERATORS)] if changes else []
    sizes = len(before.graph.initializer), len(after.graph.initializer)
    opsets = onnx_opset(before), onnx_opset(after)
    pairs = (("initializers", sizes), ("opset", opsets))
    parts += [f"{what} {one} to {other}" for what, (one, other) in pairs if one != other]
    return "; ".join(parts) or "names, attributes or values"


def onnx_opset(model: onnx.ModelProto) -> int | None:
    """Return the version of ONNX's own operator set that a model imports."""
    return next((each.version for each in reversed(model.opset_import) if not each.domain), None)


def _content(model: onnx.ModelProto) -> tuple[object, ...]:
    """Return the content of a graph that determines its results, except for the values of initializers."""
    return (
        [(each.domain, each.version) for each in model.opset_import],
        [each.SerializeToString(deterministic=True) for each in (*model.graph.input, *model.graph.output)],
        [_plain(node) for node in model.graph.node],
        [[_plain(node) for node in function.node] for function in model.functions],
        [(each.name, each.data_type, tuple(each.dims)) for each in model.graph.initializer],
    )


def _plain(node: onnx.NodeProto) -> tuple[object, ...]:
    attributes = [
        (each.name, _subgraph(each.g) if each.HasField("g") else each.SerializeToString(deterministic=True))
        for each in sorted(node.attribute, key=lambda each: each.name)
    ]
    return node.domain, node.op_type, tuple(node.input), tuple(node.output), attributes


def _subgraph(graph: onnx.GraphProto) -> tuple[object, ...]:
    """Return the content of a branch or a loop's body without the types of inner values, which are optional."""
    return (
        [each.name for each in (*graph.input, *graph.output)],
        [_plain(node) for node in graph.node],
        [(each.name, each.data_type, tuple(each.dims), _values(each)) for each in graph.initializer],
    )


def _values(tensor: onnx.TensorProto) -> object:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    if tensor.data_type == onnx.TensorProto.STRING:
        return list(tensor.string_data)
    return onnx.numpy_helper.to_array(tensor).tobytes()
