"""Forward and backward of a model as one exported program: autograd runs while it is traced.

So custom backwards, hooks, detach, no_grad and tied weights are in the graph as in eager; ``torch.export`` and then the
backward of its result would lose them.

1. ``make_fx`` traces the forward and ``torch.autograd.backward`` on new leaves, almost without decompositions;
   gradients of slices of one tensor are concatenated.
2. ``make_fx`` traces that graph, functionalized, with torch's core decompositions and those of operators that ONNX
   lacks.
3. The result becomes an ``ExportedProgram``.

Inputs have the names of parameters and buffers (``fc1.weight``, ``bn.running_mean``), ``input.x`` and, for each output
that requires a gradient, ``grad_output`` or ``grad_output.logits``; random numbers of the model are inputs too,
``random.dropout`` (see ``gradctl.joint.random_inputs``). Outputs are ``output`` or ``output.logits``,
``grad.fc1.weight``, ``grad.input.x``, and ``updated.bn.running_mean`` for a tensor that the forward changes. A leaf
that affects no output has no gradient, as in eager.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradctl.joint.decompositions import EARLY, TABLE
from gradctl.joint.decompositions.losses import fake_ctc_loss
from gradctl.joint.detached import CONSTANT
from gradctl.joint.dynamic_shapes import exported_axes, free_sizes, named_axes, with_sizes
from gradctl.joint.export_error import JointExportError
from gradctl.joint.joint_program import exported_program
from gradctl.joint.optimizer_update import NEXT, OptimizerUpdate
from gradctl.joint.provenance import place_of, places_by_operator
from gradctl.joint.random_inputs import Distribution, RandomInput
from gradctl.joint.slice_gradients import join_parts
from gradctl.joint.step import TrainingStep
from gradctl.subject.inputs.dynamic_sizes import Dynamic, by_leaf
from gradctl.subject.instance import Instance
from gradctl.subject.torch_private import (
    DispatchKey,
    FakeTensorMode,
    OpOverload,
    core_aten_decompositions,
    detect_fake_mode,
    dynamo_config,
    enable_python_dispatcher,
)

_NO_OPERATION = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default, torch.ops.aten.alias.default)
_IDEMPOTENT = (torch.ops.aten.relu.default,)


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """A joint program."""

    program: torch.export.ExportedProgram  # of tensors in a flat order
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Tensor]  # the current values of parameters and buffers, by name
    constants: tuple[str, ...]  # names of buffers that the forward does not change
    random_inputs: Mapping[str, Distribution]  # of the inputs that hold the model's random numbers, by name
    places: Mapping[str, str]  # the user's line of each operator, ``" (net.py, line 12)"``
    axes: Mapping[str, Mapping[int, str]]  # names of symbolic sizes, by input and axis


def joint_program(
    instance: Instance,
    *,
    dynamic: Dynamic | None = None,
    wrt: Sequence[str] = ("*",),
    update: OptimizerUpdate | None = None,
) -> Joint:
    """Return forward and backward of a model in one program.

    Args:
        instance: a private copy, with its hooks.
        dynamic: symbolic sizes, by input and axis; all others are fixed to those of the inputs.
        wrt: leaves to differentiate by, globs of ``param:fc1.weight`` and ``input:x``; without any, the program is the
            forward alone.
        update: the step of an optimizer on the gradients of a loss, which takes the place of the cotangents.

    Raises:
        JointExportError: there is no gradient, or a step of the model is not the same in every call.
        TargetError: GC104 if ``dynamic`` or ``wrt`` names an unknown input.
        Exception: whatever tracing and the user's model raise.
    """
    step, dynamic = TrainingStep(instance, wrt, update), dynamic or {}
    if wrt and not step.is_differentiable:
        raise JointExportError("no output requires a gradient.")
    _ensure_distinct(step.names)
    by_leaf(instance.subject.model, step.args, step.kwargs, dynamic, lambda axes: axes)  # refuses unknown inputs
    free = {f"input.{name}": axes for name, axes in dynamic.items()}
    fakes, draws = _fakes(step, free)
    instance.restore()  # tensors that the model has kept for its next call are fake
    mode = detect_fake_mode(fakes)
    assert mode is not None
    with (
        _fake(mode),
        preserve_node_meta(),
        dynamo_config.patch(error_on_nested_fx_trace=False),  # trace the functions that torch.compile wraps
        _with_autograd(torch.ops.aten.multilabel_margin_loss_forward.default),
    ):
        traced = make_fx(step, decomposition_table=EARLY, _allow_non_fake_inputs=True)(*fakes)
        found = step.traced
        join_parts(traced)
        graph = make_fx(
            functionalize(fx.Interpreter(traced).run, remove="mutations"),
            decomposition_table={**core_aten_decompositions(), **TABLE},
            _allow_non_fake_inputs=True,
        )(*fakes)
    instance.restore()
    _ensure_distinct([*step.names, *found.outputs, *found.gradients, *found.updated])
    if wrt and not found.gradients and update is None:
        raise JointExportError(f"no output depends on {' '.join(wrt)}.")
    _remove_operators_without_effect(graph)
    _rename_inputs(graph, step.names)
    _ensure_repeats(graph)
    named = dict(zip(step.names, fakes, strict=True))
    sizes = free_sizes(named, free)
    program = exported_program(graph, step.tensors, list(map(exported_axes, fakes)))
    return Joint(
        program,
        tuple(step.names),
        (*found.outputs, *found.gradients, *found.updated),
        {**step.parameters, **step.buffers, **step.optimizer_state},
        tuple(name for name in step.buffers if not {f"updated.{name}", f"{NEXT}{name}"} & set(found.updated)),
        {name: with_sizes(draw.distribution, sizes) for name, draw in draws.items()},
        places_by_operator(graph),
        {name: named_axes(fake, sizes) for name, fake in named.items()},
    )


@contextmanager
def _fake(mode: FakeTensorMode) -> Iterator[None]:
    """Let a model run on fake tensors, with attention decomposed."""
    with mode, enable_python_dispatcher(), fake_ctc_loss(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _with_autograd(operator: OpOverload) -> Iterator[None]:
    """Let autograd see an operator that torch decomposes before autograd, wrongly, so that ours can replace it."""
    key = DispatchKey.Autograd
    kernel = operator.py_kernels.pop(key)
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels[key] = kernel
        operator._dispatch_cache.clear()


def _ensure_distinct(names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise JointExportError(f"two values of the graph would be called {twice!r}: rename the parameter or the input.")


def _fakes(step: TrainingStep, free: Mapping[str, Mapping[int, str]]) -> tuple[list[Tensor], dict[str, RandomInput]]:
    """Return fake inputs of the step, with symbols for free sizes; and the random inputs.

    The sizes of the random inputs and of the cotangents follow from a run on fake tensors.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    names, values = step.names, step.tensors
    fakes = {}
    for name, value in zip(names[: len(names) - len(step.random_inputs) - len(step.cotangents)], values, strict=False):
        kinds = [DimDynamic.DYNAMIC if axis in free.get(name, {}) else DimDynamic.STATIC for axis in range(value.ndim)]
        fakes[name] = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
    ignored = mode.shape_env.ignore_fresh_unbacked_symbols()
    with _fake(mode), ignored:
        outputs, draws = step.forward(fakes)
        _ensure_same_draws(step.random_inputs, draws)
        drawn = [torch.empty(draw.shape, dtype=draw.dtype) for draw in draws.values()]
        # Contiguous, as the step's inputs are: another layout allows other views.
        layout = torch.contiguous_format
        cotangents = [torch.empty_like(outputs[name], memory_format=layout).detach() for name in step.cotangents]
    return [*fakes.values(), *drawn, *cotangents], draws


def _ensure_same_draws(eager: Mapping[str, RandomInput], traced: Mapping[str, RandomInput]) -> None:
    """Raise if a trace uses other random numbers than eager."""
    kinds = [
        {name: (draw.distribution["distribution"], draw.dtype) for name, draw in draws.items()}
        for draws in (eager, traced)
    ]
    names = [name for name in {**eager, **traced} if kinds[0].get(name) != kinds[1].get(name)]
    if names:
        raise JointExportError(f"{names[0]!r} is drawn differently when the model is traced: draw it outside.")


def _remove_operators_without_effect(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        is_second = node.target in _IDEMPOTENT and node.all_input_nodes[0].target is node.target
        if node.op == "call_function" and (node.target in _NO_OPERATION or is_second):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is CONSTANT:
            node.target = _NO_OPERATION[0]


def _rename_inputs(graph: fx.GraphModule, names: Sequence[str]) -> None:
    """Replace the names of a graph's inputs with the user's, as identifiers."""
    taken = {*keyword.kwlist, *(node.name for node in graph.graph.nodes if node.op != "placeholder")}
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), names, strict=True):
        word = re.sub(r"\W|^(?=\d)", "_", name)
        while word in taken:
            word += "_"
        taken.add(word)
        node.target = node.name = word
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _ensure_repeats(graph: fx.GraphModule) -> None:
    """Raise for an operator that generates random numbers: those of the graph would not be those of eager."""
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise JointExportError(f"{node.target} draws random numbers{place_of(node)}: draw them outside.")
