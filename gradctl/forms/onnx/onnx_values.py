"""The inner values of an ONNX graph: copies of it with as many values as outputs as a bounded memory allows.

Nodes are mapped to the user's program by the metadata that torch's exporter writes; other tools write none.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import torch

from gradctl.core.errors import TargetError
from gradctl.forms.form import Captured
from gradctl.forms.graph_value import GraphRun, GraphValue, NoGraph
from gradctl.forms.source_location import SourceLocation, line_in
from gradctl.onnxio.onnx_file import OnnxFile, initializers, session_with_outputs
from gradctl.onnxio.session import static_shape
from gradctl.onnxio.submodel import values_used_by
from gradctl.tracing.values import ValueWatch

_BYTES_A_RUN = 2**28
_VALUES_A_RUN = 8  # if shapes are not known
_MOST_VALUES_A_RUN = 256


def watch_values(captured: Captured, watch: ValueWatch) -> tuple[Callable[..., Any], Callable[[], GraphRun]]:
    """Return a callable to use instead of the form, and a function that returns the values of the last call.

    Raises:
        NoGraph: the external data of the file are missing.
    """
    file: OnnxFile = captured.artifact
    graph = file.model.graph
    values = {name: GraphValue(name, None) for name in _sources(graph)}
    for node in graph.node:
        place = node_location(node)
        inputs = tuple(name for name in values_used_by(node) if name)
        values |= {name: GraphValue(name, place, inputs) for name in node.output if name}
    for name, tensor in initializers(file):
        watch.see(values[name], tensor)

    def call(*args: Any, **kwargs: Any) -> Any:
        feeds = captured.call.feeds_of(args, kwargs)  # type: ignore[attr-defined]  # of a session
        for name, array in feeds.items():
            watch.see(values[name], torch.from_numpy(np.array(array)))
        for names in _in_parts(file):
            try:
                running = session_with_outputs(file, names)
            except TargetError as error:
                raise NoGraph from error
            for name, found in zip(names, running.run(names, feeds), strict=True):
                if isinstance(found, np.ndarray | np.generic) and found.dtype.kind in "fiub":
                    watch.see(values[name], torch.from_numpy(np.array(found)))
        return captured.call(*args, **kwargs)

    return call, lambda: GraphRun(tuple(values.values()), tuple(each.name for each in graph.output))


def node_location(node: onnx.NodeProto) -> SourceLocation:
    """Return the operator of a node, and its module, file and line if the exporter wrote them."""
    kept = {each.key: each.value for each in node.metadata_props}
    file, line = line_in(kept.get("pkg.torch.onnx.stack_trace", "")) or (None, None)
    try:
        scopes = list(ast.literal_eval(kept.get("pkg.torch.onnx.name_scopes", "[]")))
    except (ValueError, SyntaxError):
        scopes = []
    return SourceLocation(str(scopes[-2]) if len(scopes) > 1 else "", node.op_type, file, line)


def _sources(graph: onnx.GraphProto) -> list[str]:
    sparse = [each.values.name for each in graph.sparse_initializer]
    return [*(each.name for each in graph.input), *(each.name for each in graph.initializer), *sparse]


def _in_parts(file: OnnxFile) -> Iterator[list[str]]:
    """Yield the names of the values of nodes, in order, as many at a time as one run may return."""
    graph = onnx.shape_inference.infer_shapes(file.model).graph
    sizes = {each.name: _bytes(each) for each in (*graph.value_info, *graph.output)}
    part: list[str] = []
    filled = 0.0
    for name in (name for node in graph.node for name in node.output if name):
        size = sizes.get(name) or _BYTES_A_RUN / _VALUES_A_RUN
        if part and (filled + size > _BYTES_A_RUN or len(part) == _MOST_VALUES_A_RUN):
            yield part
            part, filled = [], 0.0
        part.append(name)
        filled += size
    if part:
        yield part


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    """Return the size of a value in bytes; None if its shape is not known."""
    shape = static_shape(value)
    return None if shape is None else 8 * math.prod(shape)
