"""A traced graph as an ``ExportedProgram``.

``torch.export`` would trace the graph once more, in a quarter of the time of a joint export. A graph of known sizes
needs no second trace; of symbolic sizes, ``torch.export`` finds the constraints.

Private to torch (seen in 2.10 to 2.14): the arguments of ``ExportedProgram``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from gradctl.subject.torch_private import tree_leaves, tree_structure
from gradctl.tracing.operators import writes


def exported_program(
    graph: fx.GraphModule, tensors: Sequence[Tensor], shapes: Sequence[Mapping[int, object] | None]
) -> ExportedProgram:
    """Return a functional graph, which is changed, as a program on tensors in a flat order.

    ``shapes`` are the symbolic sizes of each of its inputs ``tensors``, as ``dynamic_shapes`` of ``torch.export``.

    Raises:
        Exception: whatever ``torch.export`` raises about symbolic sizes.
    """
    if not all(map(_is_known, graph.graph.nodes)):
        return torch.export.export(graph, tuple(tensors), dynamic_shapes=tuple(shapes), strict=False)
    inputs = graph.graph.find_nodes(op="placeholder")
    constants = _lift_constants(graph, inputs[0])
    result = graph.graph.output_node()
    outputs = tuple(result.args[0])  # type: ignore[arg-type]
    result.args = (outputs,)
    lifted = [InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name) for name, node in constants.items()]
    given: list[Any] = [TensorArgument(node.name) for node in inputs]
    found: list[Any] = [TensorArgument(node.name) for node in outputs]
    signature = ExportGraphSignature(
        [*lifted, *(InputSpec(InputKind.USER_INPUT, each, None) for each in given)],
        [OutputSpec(OutputKind.USER_OUTPUT, each, None) for each in found],
    )
    example: tuple[tuple[Tensor, ...], dict[str, Tensor]] = (tuple(tensors), {})
    # Names of its inputs and outputs would not be renamed with those of the graph, which a pass may do: torch.export
    # writes none, and with them ExecuTorch rejects the program.
    call = ModuleCallSignature([], [], tree_structure(example), tree_structure(outputs))
    values = {name: getattr(graph, name) for name in constants}
    return ExportedProgram(graph, graph.graph, signature, {}, {}, [ModuleCallEntry("", call)], example, values)


def _is_known(node: fx.Node) -> bool:
    """Return whether a node returns tensors of known sizes, writes to none, and calls no subgraph."""
    if writes(node.target):
        return False
    values = [each for each in tree_leaves(node.meta.get("val")) if each is not None]
    of_known_sizes = (isinstance(each, Tensor) and all(isinstance(size, int) for size in each.shape) for each in values)
    return node.op == "output" or (bool(values) and all(of_known_sizes))


def _lift_constants(graph: fx.GraphModule, first: fx.Node) -> dict[str, fx.Node]:
    """Replace the constants of a graph with inputs, and return these by the constant's name."""
    lifted: dict[str, fx.Node] = {}
    for node in list(graph.graph.find_nodes(op="get_attr")):
        name = str(node.target)
        if name not in lifted:
            with graph.graph.inserting_before(first):
                lifted[name] = graph.graph.placeholder(f"c_{name}")
            lifted[name].meta = node.meta
        node.replace_all_uses_with(lifted[name])
        graph.graph.erase_node(node)
    return lifted
