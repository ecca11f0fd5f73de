"""The values of an exported program: its graph run node by node, each with the stack trace that the exporter kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from gradctl.forms.form import Captured
from gradctl.forms.graph_value import GraphRun, GraphValue, NoGraph
from gradctl.forms.source_location import SourceLocation, line_in
from gradctl.subject.torch_private import tree_flatten_spec
from gradctl.tracing.values import ValueWatch


def watch_values(captured: Captured, watch: ValueWatch) -> tuple[Callable[..., Any], Callable[[], GraphRun]]:
    """Return a callable to use instead of the form, and a function that returns the values of the last call.

    Raises:
        NoGraph: the captured module is not a GraphModule.
    """
    module = captured.call
    if not isinstance(module, fx.GraphModule):
        raise NoGraph
    runs: list[_Watching] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        specification = module.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]  # not in torch's stubs
        flat = tree_flatten_spec((args, kwargs), specification)
        runs[:] = [_Watching(module, watch)]
        return module.graph.process_outputs(runs[0].run(*flat, enable_io_processing=False))

    return call, lambda: GraphRun(tuple(runs[0].values.values()), _outputs(module))


class _Watching(fx.Interpreter):
    """Run a graph and sketch the values of its nodes."""

    def __init__(self, module: fx.GraphModule, watch: ValueWatch) -> None:
        super().__init__(module)
        self.watch = watch
        self.values: dict[str, GraphValue] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            inputs = tuple(each.name for each in n.all_input_nodes)
            value = self.values[n.name] = GraphValue(n.name, _place(n), inputs)
            self.watch.see(value, result)
        return result


def _place(node: fx.Node) -> SourceLocation | None:
    if node.op in ("placeholder", "get_attr"):
        return None
    described, name = _described(node), str(node.target)
    file, line = line_in(described.meta.get("stack_trace") or "") or (None, None)
    modules = [path for path, _ in (described.meta.get("nn_module_stack") or {}).values()]
    return SourceLocation(_without_calls(modules[-1] if modules else ""), name.removesuffix(".default"), file, line)


def _described(node: fx.Node) -> fx.Node:
    """Return the node, or if it has no stack trace, the nearest first input that has one."""
    while not node.meta.get("stack_trace") and node.all_input_nodes and node.op == "call_function":
        node = node.all_input_nodes[0]
    return node


def _without_calls(path: str) -> str:
    """Return a module's path without the number of the call that torch.export adds (``cell@1``)."""
    return ".".join(part.partition("@")[0] for part in path.removeprefix("L__self__.").split(".") if part)


def _outputs(module: fx.GraphModule) -> tuple[str, ...]:
    last = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    return tuple(node.name for node in last.all_input_nodes)
