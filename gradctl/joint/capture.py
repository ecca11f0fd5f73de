"""Forward and backward of a model as one exported program: autograd runs while it is traced.

So custom backwards, hooks, detach, no_grad and tied weights are in the graph as eager has them; ``torch.export`` first
and a backward of what it gives would lose them.

1. ``make_fx`` runs the forward and ``torch.autograd.backward`` on fresh leaves, with hardly a decomposition; gradients
   of parts of one tensor are put beside each other.
2. ``make_fx`` runs what it wrote down, functionalized, with decompositions: torch's core ones, and ours for operators
   that ONNX lacks.
3. The result becomes an ``ExportedProgram``.

Names of inputs are those of parameters and buffers (``fc1.weight``, ``bn.running_mean``), ``input.x`` and, for each
output that asks for a gradient, ``grad_output`` or ``grad_output.logits``; random numbers that the model draws are
inputs too, ``random.dropout`` (see ``gradctl.joint.draws``). Names of outputs are ``output`` or
``output.logits``, ``grad.fc1.weight``, ``grad.input.x``, and for what the forward changes ``updated.bn.running_mean``.
What no output hangs on has no gradient, as in eager.

Private to torch (seen in 2.10 to 2.14): ``torch._decomp``, ``torch._guards``, ``torch._dispatch.python``,
``torch._dynamo.config``, ``torch._subclasses.fake_tensor``, ``torch.fx.experimental``.
"""

from __future__ import annotations

import fnmatch
import keyword
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradctl.core.errors import TargetError, nearest
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.joint.decompositions import EARLY, TABLE
from gradctl.joint.decompositions.ctc import without_data
from gradctl.joint.draws import Distribution, Draw, Draws, only_torch_draws
from gradctl.joint.parts import join_parts
from gradctl.joint.places import Places, place_of, places_by_operator
from gradctl.joint.program import exported_program
from gradctl.joint.recurrent import ScannedLayers
from gradctl.joint.refusal import CannotJoin
from gradctl.joint.sizes import exported_axes, free_sizes, named_axes, with_sizes
from gradctl.numerics.measures import same_values
from gradctl.subject.dynamic import Dynamic, by_leaf
from gradctl.subject.inputs import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["Joint", "joint_program"]

_Result = TypeVar("_Result")

_FEW = 8  # names that a message lists
_DROPPED = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default, torch.ops.aten.alias.default)
_ONCE = (torch.ops.aten.relu.default,)  # a second time changes nothing


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """A joint program.

    Attributes:
        program: takes and gives tensors in a flat order.
        inputs: their names, in this order.
        outputs: names of what it gives, in this order.
        values: what parameters and buffers are now, by name.
        constants: names of buffers that the forward does not change.
        draws: what inputs hold that the model draws, by name.
        places: the user's lines that operators come from, ``" (net.py, line 12)"``.
        axes: names of free sizes, by input and axis.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Tensor]
    constants: tuple[str, ...]
    draws: Mapping[str, Distribution]
    places: Mapping[str, str]
    axes: Mapping[str, Mapping[int, str]]


class _Step(nn.Module):
    """Whatever is done with a model while its parameters are others, backward too."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[Any], Any]) -> Any:
        return act(self.model)


@dataclass(slots=True)
class _Traced:
    """What the trace of one step has found."""

    outputs: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)


class _Subject:
    """A model as a function of flat tensors.

    Args:
        instance: a private copy; its model is run once, as it is.
    """

    def __init__(self, instance: Instance, wrt: Sequence[str] = ("*",)) -> None:
        self.instance, self.wrt = instance, wrt
        self.step, self.places = _Step(instance.model), Places()
        module = module_of(instance.model)
        self.parameters = dict(module.named_parameters()) if module is not None else {}
        self.buffers = dict(module.named_buffers()) if module is not None else {}
        instance.restore()
        args, kwargs = instance.inputs()
        state = {**self.parameters, **self.buffers}
        before = {name: value.detach().clone() for name, value in state.items()}
        seed_generators(instance.subject.seed)
        with instance.leaves_kept():
            with torch.enable_grad(), only_torch_draws(), Draws(instance.model) as draws:
                named = _named(instance.model(*args, **kwargs))
            # BatchNorm writes its running statistics without counting up their version.
            self.written = {name for name, value in state.items() if not same_values(value, before[name])}
        self.draws = draws.by_name
        # A cotangent for each output that asks for one.
        self.asking = {name: torch.randn_like(value) for name, value in named if value.requires_grad}
        instance.restore()
        self.args, self.kwargs = instance.inputs()
        inputs = input_names(instance.subject.model, self.args, self.kwargs)
        self.given = {f"input.{name}": value for name, value in inputs if isinstance(value, Tensor)}
        self.traced = _Traced()

    @property
    def names(self) -> list[str]:
        """Return the names of what the function takes."""
        cotangents = [f"grad_{name}" for name in self.asking]
        return [*self.parameters, *self.buffers, *self.given, *self.draws, *cotangents]

    @property
    def tensors(self) -> list[Tensor]:
        """Return what it takes now."""
        drawn = [draw.again() for draw in self.draws.values()]
        state = (*self.parameters.values(), *self.buffers.values(), *self.given.values())
        values = (*state, *drawn, *self.asking.values())
        return [value.detach().clone(memory_format=torch.contiguous_format) for value in values]

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        """Return outputs, gradients, and parameters and buffers that changed, in the order that ``traced`` tells."""
        values = dict(zip(self.names, flat, strict=True))
        with torch.enable_grad():
            now = {name: value.clone() if name in self.written else value for name, value in values.items()}
            weights = {name: self._leaf(now[name], old) for name, old in self.parameters.items()}
            kept = {name: values[name].clone() for name in self.buffers}
            given = {name: self._input(values[name], old) for name, old in self.given.items()}
            inputs = {name: each for name, (_, each) in given.items()}

            def act(model: Callable[..., Any]) -> list[Tensor]:
                outputs = self._outputs(model, inputs)
                wanted = {**weights, **{name: leaf for name, (leaf, _) in given.items()}}
                gradients = self._gradients(outputs, wanted, values)
                updated = _updated(model, kept, self.written)
                updated |= {f"updated.{name}": leaf for name, leaf in weights.items() if name in self.written}
                self.traced = _Traced(list(outputs), list(gradients), list(updated))
                results = (*outputs.values(), *gradients.values(), *updated.values())
                return [each.detach().clone() for each in results]

            return self._with({**weights, **kept}, [values[name] for name in self.draws], act)[0]

    def forward(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Draw]]:
        """Return the outputs by name, for parameters, buffers and inputs by name, and what was drawn for them."""
        with torch.enable_grad():
            weights = {name: self._leaf(values[name], old) for name, old in self.parameters.items()}
            kept = {name: values[name].clone() for name in self.buffers}
            inputs = {name: self._input(values[name], old)[1] for name, old in self.given.items()}
            return self._with({**weights, **kept}, None, lambda model: self._outputs(model, inputs))

    def _with(
        self, state: Mapping[str, Tensor], drawn: Sequence[Tensor] | None, act: Callable[[Any], _Result]
    ) -> tuple[_Result, dict[str, Draw]]:
        """Return what ``act`` returns for the model with these parameters, buffers and draws, and what it drew."""
        seed_generators(self.instance.subject.seed + 1)  # not as a run is: what sets that seed itself must show
        with self.places, Draws(self.instance.model, drawn) as draws, ScannedLayers():
            found = functional_call(self.step, {f"model.{name}": each for name, each in state.items()}, (act,))
        return found, draws.by_name

    def _outputs(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pending = iter(inputs.values())
        versions = {name: each._version for name, each in inputs.items()}
        args, kwargs = map_leaves(
            lambda _, leaf: next(pending) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        outputs = dict(_named(model(*args, **kwargs)))
        for name, each in inputs.items():
            if each._version != versions[name]:
                own = name.removeprefix("input.")
                place = self.places.writes.get(each.untyped_storage()._cdata, "")
                raise CannotJoin(f"the model writes to its input {own!r}{place}, which no graph can: clone it first.")
        return outputs

    def _gradients(
        self, outputs: Mapping[str, Tensor], leaves_by_name: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        wanted = {name: leaf for name, leaf in leaves_by_name.items() if leaf.requires_grad and self._is_wanted(name)}
        if not wanted:
            leaves_there = [self._report_name(name) for name, leaf in leaves_by_name.items() if leaf.requires_grad]
            raise TargetError(
                "GC104",
                f"--wrt {' '.join(self.wrt)} names nothing that asks for a gradient"
                f"{nearest(self.wrt[0], leaves_there)}: there are {', '.join(leaves_there[:_FEW]) or 'none'}.",
            )
        asking = [outputs[name] for name in self.asking]
        cotangents = [values[f"grad_{name}"] for name in self.asking]
        # As training takes them: reentrant checkpoints refuse autograd.grad.
        torch.autograd.backward(asking, cotangents)
        return {f"grad.{name}": leaf.grad for name, leaf in wanted.items() if leaf.grad is not None}

    def _is_wanted(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(self._report_name(name), pattern) for pattern in self.wrt)

    def _report_name(self, name: str) -> str:
        return input_name(name.removeprefix("input.")) if name in self.given else parameter_name(name)

    def _leaf(self, value: Tensor, old: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_(old.requires_grad)
        for hook in (old._backward_hooks or {}).values():
            leaf.register_hook(hook)  # type: ignore[no-untyped-call]
        return leaf

    def _input(self, value: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return an input as what collects its gradient, and as the model has it."""
        asks = self.instance.input_mode != "constant" and (old.is_floating_point() or old.is_complex())
        leaf = value.detach().requires_grad_(asks)
        return leaf, leaf.clone() if self.instance.input_mode == "clone" or not asks else leaf


def joint_program(instance: Instance, *, dynamic: Dynamic | None = None, wrt: Sequence[str] = ("*",)) -> Joint:
    """Return forward and backward of a model in one program.

    Args:
        instance: a private copy, with its hooks.
        dynamic: sizes that stay free, by input and axis; all others are fixed to those of the inputs.
        wrt: what to differentiate by, globs of ``param:fc1.weight`` and ``input:x``.

    Raises:
        CannotJoin: there is no gradient to take, or a step of the model is not the same in every call.
        TargetError: GC104 if ``dynamic`` or ``wrt`` names what is not there.
        Exception: whatever tracing and the user's model raise.
    """
    subject = _Subject(instance, wrt)
    if not subject.asking:
        raise CannotJoin("no output asks for a gradient.")
    _ensure_apart(subject.names)
    free = _free_axes(subject, dynamic or {})
    fakes, draws = _fakes(subject, free)
    mode = detect_fake_mode(fakes)
    assert mode is not None
    with (
        mode,
        enable_python_dispatcher(),
        without_data(),
        sdpa_kernel(SDPBackend.MATH),
        preserve_node_meta(),
        _compiled_parts_as_eager(),
    ):
        traced = make_fx(subject, decomposition_table=EARLY, _allow_non_fake_inputs=True)(*fakes)
        found = subject.traced
        join_parts(traced)
        graph = make_fx(
            functionalize(fx.Interpreter(traced).run, remove="mutations"),
            decomposition_table={**core_aten_decompositions(), **TABLE},
            _allow_non_fake_inputs=True,
        )(*fakes)
    instance.restore()
    _ensure_apart([*subject.names, *found.outputs, *found.gradients, *found.updated])
    if not found.gradients:
        raise CannotJoin(f"no output hangs on {' '.join(wrt)}.")
    _clean(graph, subject.names)
    _ensure_repeats(graph)
    named = dict(zip(subject.names, fakes, strict=True))
    sizes = free_sizes(named, free)
    shapes = tuple(exported_axes(fake, sizes) for fake in fakes)
    program = exported_program(graph, subject.tensors, shapes)
    changed = {name.removeprefix("updated.") for name in found.updated}
    return Joint(
        program,
        tuple(subject.names),
        (*found.outputs, *found.gradients, *found.updated),
        {**subject.parameters, **subject.buffers},
        tuple(name for name in subject.buffers if name not in changed),
        {name: with_sizes(draw.distribution, sizes) for name, draw in draws.items()},
        places_by_operator(graph),
        {name: named_axes(fake, sizes) for name, fake in named.items()},
    )


def _compiled_parts_as_eager() -> AbstractContextManager[None]:
    """Let functions inside the model that torch.compile has wrapped be traced like any other."""
    found: AbstractContextManager[None] = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    return found


def _ensure_apart(names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise CannotJoin(f"two values of the graph would be called {twice!r}: rename the parameter or the input.")


def _free_axes(subject: _Subject, dynamic: Dynamic) -> dict[str, Mapping[int, str]]:
    """Return the free axes by name of the input here."""
    model = subject.instance.subject.model
    by_leaf(model, subject.args, subject.kwargs, dynamic, lambda axes: axes)  # which refuses what is not there
    return {f"input.{name}": axes for name, axes in dynamic.items()}


def _fakes(subject: _Subject, free: Mapping[str, Mapping[int, str]]) -> tuple[list[Tensor], dict[str, Draw]]:
    """Return tensors without data for what the step takes, symbols in place of sizes that are free; and the draws.

    Those have sizes, and cotangents those of the outputs, that only a run without data can tell.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    names, values = subject.names, subject.tensors
    fakes = {}
    for name, value in zip(names[: len(names) - len(subject.draws) - len(subject.asking)], values, strict=False):
        kinds = [DimDynamic.DYNAMIC if axis in free.get(name, {}) else DimDynamic.STATIC for axis in range(value.ndim)]
        fakes[name] = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
    with mode, enable_python_dispatcher(), without_data(), sdpa_kernel(SDPBackend.MATH):
        outputs, draws = subject.forward(fakes)
        _ensure_alike(subject.draws, draws)
        drawn = [torch.empty(draw.shape, dtype=draw.dtype) for draw in draws.values()]
        # Laid out as what the step is given later: a view of one may be none of the other.
        layout = torch.contiguous_format
        cotangents = [torch.empty_like(outputs[name], memory_format=layout).detach() for name in subject.asking]
    return [*fakes.values(), *drawn, *cotangents], draws


def _ensure_alike(eager: Mapping[str, Draw], traced: Mapping[str, Draw]) -> None:
    """Raise where a trace draws what eager does not: torch's of recurrent layers leaves their dropout out (2.13)."""
    kinds = [
        {name: (draw.distribution["distribution"], draw.dtype) for name, draw in draws.items()}
        for draws in (eager, traced)
    ]
    names = [name for name in {**eager, **traced} if kinds[0].get(name) != kinds[1].get(name)]
    if names:
        raise CannotJoin(
            f"{names[0]!r} is not drawn alike when the model is traced; of recurrent layers torch traces no dropout: "
            "put nn.Dropout between them."
        )


def _updated(model: Callable[..., Any], kept: Mapping[str, Tensor], written: Set[str]) -> dict[str, Tensor]:
    """Return the buffers that a call has written to or replaced, ``written`` among them."""
    module = module_of(model)
    now = dict(module.named_buffers()) if module is not None else {}
    return {
        f"updated.{name}": now[name]
        for name, value in kept.items()
        if name in now and (now[name] is not value or value._version or name in written)
    }


def _named(value: Any) -> list[tuple[str, Tensor]]:
    return [(output_name(path), leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]


def _clean(graph: fx.GraphModule, names: Sequence[str]) -> None:
    """Take out what is for autograd alone, and call inputs what the user calls them."""
    for node in list(graph.graph.nodes):
        is_second = node.target in _ONCE and node.all_input_nodes[0].target is node.target
        if node.op == "call_function" and (node.target in _DROPPED or is_second):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    taken = {*keyword.kwlist, *(node.name for node in graph.graph.nodes if node.op != "placeholder")}
    for node, name in zip(placeholders, names, strict=True):
        word = re.sub(r"\W|^(?=\d)", "_", name)
        while word in taken:
            word += "_"
        taken.add(word)
        node.target = node.name = word
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _ensure_repeats(graph: fx.GraphModule) -> None:
    """Raise for an operator that draws random numbers: a graph of it would give others than eager."""
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise CannotJoin(f"{node.target} draws random numbers{place_of(node)}: draw them outside.")
