"""The values of a TorchScript graph with its calls inlined: every tensor of the outermost block becomes an output.

Private to torch (seen in 2.10 to 2.14): a graph's ``registerOutput`` and ``makeMultiOutputIntoTuple``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradctl.forms.form import Captured
from gradctl.forms.graph_value import GraphRun, GraphValue
from gradctl.forms.source_location import SourceLocation, line_in
from gradctl.subject.torch_private import create_function_from_graph
from gradctl.tracing.values import ValueWatch


def watch_values(captured: Captured, watch: ValueWatch) -> tuple[Callable[..., Any], Callable[[], GraphRun]]:
    """Return a callable to use instead of the form, and a function that returns the values of the last call."""
    script = captured.artifact
    is_module = isinstance(script, torch.nn.Module)
    graph = script.inlined_graph.copy()
    values = {
        each.debugName(): GraphValue(each.debugName(), _place(node), tuple(v.debugName() for v in node.inputs()))
        for node in graph.nodes()
        for each in node.outputs()
    }
    own = [each.debugName() for each in graph.outputs()]
    given = [each.debugName() for each in graph.inputs()]
    shown = [each for node in graph.nodes() for each in node.outputs() if each.type().kind() == "TensorType"]
    names = [each.debugName() for each in shown]
    for each in shown:
        graph.registerOutput(each)
    graph.makeMultiOutputIntoTuple()
    function = create_function_from_graph("values", graph)
    plainly: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]  # torch gives it no types
    arguments = (script.forward if is_module else script).schema.arguments[1 if is_module else 0 :]

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = [*args, *(kwargs[each.name] for each in arguments[len(args) :] if each.name in kwargs)]
        bound = [script._c, *bound] if is_module else bound
        with plainly(False):  # or autograd sees fused blocks
            found = function(*bound)
        results, tensors = (found[: len(own)], found[len(own) :]) if names or len(own) > 1 else ((found,), ())
        for name, tensor in (*zip(given, bound, strict=True), *zip(names, tensors, strict=True)):
            watch.see(values.setdefault(name, GraphValue(name, None)), tensor)
        return results[0] if len(own) == 1 else results

    # Inputs come first: they were added at the call.
    return call, lambda: GraphRun(tuple(sorted(values.values(), key=lambda each: each.place is not None)), tuple(own))


def _place(node: Any) -> SourceLocation | None:
    if node.kind() in ("prim::Constant", "prim::GetAttr"):
        return None
    op = node.pyname() if node.kind() == "prim::PythonOp" else node.kind().replace("::", ".")
    path = node.scopeName().rpartition("/")[2].removeprefix("__module.").removeprefix("__module")
    file, line = line_in(node.sourceRange()) or (None, None)
    return SourceLocation(path, op, file, line)
