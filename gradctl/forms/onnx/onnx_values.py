"""The values inside an ONNX graph: a copy that gives out as many of them at a time as fit a bounded memory.

Nodes are mapped to the user's program by what torch's exporter keeps in their metadata; those of other tools have none.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from gradctl.forms.form import Captured
from gradctl.forms.graph_value import GraphRun, GraphValue, NoGraph
from gradctl.forms.source_location import SourceLocation, line_in
from gradctl.onnxio.onnx_file import OnnxFile, initializers
from gradctl.tracing.values import ValueWatch

__all__ = ["node_place", "watched"]

_BYTES_A_RUN = 2**28
_VALUES_A_RUN = 8  # where shapes are not known
_MOST_VALUES_A_RUN = 256


def watched(captured: Captured, watch: ValueWatch) -> tuple[Callable[..., Any], Callable[[], GraphRun]]:
    """Return what to call instead of the form, and what gives the values of the last call.

    Raises:
        NoGraph: external data of the file are not where they were.
    """
    file: OnnxFile = captured.artifact
    graph = file.model.graph
    values = {name: GraphValue(name, None) for name in _sources(graph)}
    for node in graph.node:
        place = node_place(node)
        inputs = (*(name for name in node.input if name), *_taken_inside(node))
        values |= {name: GraphValue(name, place, inputs) for name in node.output if name}
    for name, tensor in initializers(file):
        watch.see(values[name], tensor)

    def call(*args: Any, **kwargs: Any) -> Any:
        feeds = captured.call.feeds_of(args, kwargs)  # type: ignore[attr-defined]  # of a session
        for name, array in feeds.items():
            watch.see(values[name], torch.from_numpy(np.array(array)))
        for names in _in_parts(file):
            running = _session(file, names)
            for name, found in zip(names, running.run(names, feeds), strict=True):
                if isinstance(found, np.ndarray | np.generic) and found.dtype.kind in "fiub":
                    watch.see(values[name], torch.from_numpy(np.array(found)))
        return captured.call(*args, **kwargs)

    return call, lambda: GraphRun(tuple(values.values()), tuple(each.name for each in graph.output))


def node_place(node: onnx.NodeProto) -> SourceLocation:
    """Return where a node comes from: its operator, and module, file and line where the exporter kept them."""
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


def _taken_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Return what the subgraphs of a node take from around them (and names of their own, which nobody else makes)."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _taken_inside(inner)


def _in_parts(file: OnnxFile) -> Iterator[list[str]]:
    """Return the names of the values that nodes make, in order, so many at a time as a run may give out."""
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
    """Return what a value takes; None where its shape is not known."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not size.HasField("dim_value") for size in kind.shape.dim):
        return None
    return 8 * math.prod(int(size.dim_value) for size in kind.shape.dim)


def _session(file: OnnxFile, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """Return a session of the graph as it is written, that gives out these values."""
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        os.path.abspath(file.path.parent),  # noqa: PTH100
    )
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each of its codes, and no common one
        raise NoGraph from error
