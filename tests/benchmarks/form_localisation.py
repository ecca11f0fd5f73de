"""Does `gradctl compare` name exactly the node of a form that was changed, at what cost? 120 planted changes.

    python -m tests.benchmarks.form_localisation [--changes 120] [--seed 0]

The nets are those of ``tests.benchmarks.localisation``. One node of the exported graph, or of the ONNX graph, is
changed: of an exported one its result is multiplied by 1.1, or passed on without its gradient (``detach``); of an ONNX
one its result is multiplied by 1.1. A change counts where it moves an output of the form by 1e-3 of its norm, or for a
lost gradient where it moves some gradient by as much.

"Exactly": the worst finding of each kind names the module of the changed node and its line, as the graph itself has
them (torch's own modules in an ``nn.Sequential`` have no line of the user's), and the operator changed or put in.
The cost is the time of localisation over that of the rest of the same comparison.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from gradctl.commands import compare as comparing_module
from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.core.findings import Unit
from gradctl.forms.exported.export_values import _place as export_place
from gradctl.forms.onnx.onnx_values import node_location
from gradctl.forms.source_location import SourceLocation
from gradctl.subject.subject import Subject
from tests.benchmarks.localisation import NETS

KINDS = ("export value", "export gradient", "onnx value")


def plant_export(model: nn.Module, x: Tensor, kind: str, draw: random.Random, path: Path) -> tuple[SourceLocation, str]:
    """Write the exported model with one node changed; return the place of that node and what was put in."""
    program = torch.export.export(model, (x,), strict=False)
    graph = program.graph
    nodes = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].is_floating_point()
    ]
    node = draw.choice(nodes)
    with graph.inserting_after(node):
        target: Any = torch.ops.aten.mul.Tensor if kind == "export value" else torch.ops.aten.detach.default
        added = graph.call_function(target, (node, 1.1) if kind == "export value" else (node,))
        added.meta = dict(node.meta)
    users = [user for user in node.users if user is not added]
    for user in users:
        user.replace_input_with(node, added)
    for spec in program.graph_signature.output_specs:
        if spec.arg.name == node.name:
            spec.arg.name = added.name
    program.graph_module.recompile()
    torch.export.save(program, path)
    place = export_place(node)
    assert place is not None
    return place, str(target).removesuffix(".default")


def plant_onnx(model: nn.Module, x: Tensor, draw: random.Random, path: Path) -> tuple[SourceLocation, str]:
    """Write the ONNX model with the result of one node multiplied; return the place of that node."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    proto = onnx.shape_inference.infer_shapes(program.model_proto)
    floats = {
        each.name
        for each in (*proto.graph.value_info, *proto.graph.output)
        if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    position = draw.choice([k for k, node in enumerate(proto.graph.node) if node.output[0] in floats])
    node = proto.graph.node[position]
    name = node.output[0]
    node.output[0] = f"{name}_before"
    added = helper.make_node("Mul", [f"{name}_before", "planted_factor"], [name])
    added.metadata_props.extend(node.metadata_props)
    proto.graph.initializer.append(helper.make_tensor("planted_factor", onnx.TensorProto.FLOAT, [], [1.1]))
    proto.graph.node.insert(position + 1, added)
    onnx.save(proto, path)
    return node_location(node), "Mul"


def shows(unit: Unit) -> bool:
    """Tell whether the change moves what the comparison sees by 1e-3 at least."""
    errors = [row.error for row in unit.tensors if row.verdict not in ("same", "non-differentiable")]
    return any(isinstance(error, str) or (error is not None and error > 1e-3) for error in errors)


def is_exact(unit: Unit, place: SourceLocation, op: str) -> bool:
    """Tell whether the worst finding of each kind names the node."""
    worst = {each.quantity: each for each in reversed(unit.findings) if each.severity == "error" and each.quantity}
    lines = [
        (each.location.module or "", each.location.line if place.line else None, each.location.op)
        if each.location
        else None
        for each in worst.values()
    ]
    own = (place.op or "").removesuffix(".default")
    return bool(lines) and all(found in ((place.module, place.line, name) for name in (op, own)) for found in lines)


def main() -> None:
    """Print a row a net and kind, and the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    cells = [(net, kind) for net in NETS for kind in KINDS]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.changes} changes, seed {options.seed}"
    )
    print(f"{'net':<10} {'kind':<16} {'changes':>8} {'exactly':>8} {'comparison':>11} {'localised in':>13}")
    spent: list[float] = []
    original = comparing_module.locate_findings

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    comparing_module.locate_findings = timed
    exactly, ratios = 0, []
    for position, (net, kind) in enumerate(cells):
        count = len(range(position, options.changes, len(cells)))
        good, plain, extra = 0, [], []
        while len(plain) < count:
            model, x = NETS[net]()
            comparing = Comparing(Subject(target="net", model=model, args=(x,)), Allows(()))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / ("net.onnx" if kind.startswith("onnx") else "net.pt2")
                if kind.startswith("onnx"):
                    place, op = plant_onnx(model, x, draw, path)
                else:
                    place, op = plant_export(model, x, kind, draw, path)
                spent.clear()
                unit = comparing.file(path, trusted=True)
            if not shows(unit):
                continue
            extra.append(sum(spent))
            plain.append(unit.seconds - extra[-1])
            ratios.append(extra[-1] / plain[-1])
            if is_exact(unit, place, op):
                good += 1
            else:
                print(f"  {net}, {kind} at {place}: {sorted({str(each.location) for each in unit.findings})}")
        exactly += good
        print(
            f"{net:<10} {kind:<16} {count:>8} {good:>8} {statistics.median(plain):>9.2f} s "
            f"{statistics.median(extra):>11.2f} s",
            flush=True,
        )
    print(
        f"named exactly: {exactly} of {options.changes} ({100 * exactly / options.changes:.1f} %); cost over the "
        f"comparison itself: median {statistics.median(ratios):.2f} x, largest {max(ratios):.2f} x"
    )


if __name__ == "__main__":
    main()
