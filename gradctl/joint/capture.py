"""Forward and backward of a model as one exported program: autograd runs while it is traced.

So custom backwards, hooks, detach, no_grad and tied weights are in the graph as eager has them; ``torch.export`` first
and a backward of what it gives would lose them.

1. ``make_fx`` runs the forward and ``torch.autograd.grad`` on fresh leaves, without decompositions.
2. ``make_fx`` runs what it wrote down, functionalized, with decompositions: torch's core ones, and ours for operators
   that ONNX lacks.
3. ``torch.export`` takes the result.

Names of inputs are those of parameters and buffers (``fc1.weight``, ``bn.running_mean``), ``input.x`` and, for each
output that asks for a gradient, ``grad_output`` or ``grad_output.logits``. Names of outputs are ``output`` or
``output.logits``, ``grad.fc1.weight``, ``grad.input.x``, and for what the forward changes ``updated.bn.running_mean``.
What no output hangs on has no gradient, as in eager.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradctl.core.names import output_name
from gradctl.joint.decompositions import TABLE
from gradctl.subject.frames import first_line, is_out_of_memory
from gradctl.subject.inputs import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

__all__ = ["CannotJoin", "Joint", "joint_program"]

_DROPPED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class CannotJoin(Exception):
    """There is no joint graph of this model; says why, in a sentence.

    Args:
        reason: the sentence.
        details: the stack of what refused.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason, self.details = reason, details


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """A joint program.

    Attributes:
        program: takes and gives tensors in a flat order.
        inputs: their names, in this order.
        outputs: names of what it gives, in this order.
        values: what parameters and buffers are now, by name.
        constants: names of buffers that the forward does not change.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Tensor]
    constants: tuple[str, ...]


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

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.step = _Step(instance.model)
        module = module_of(instance.model)
        self.parameters = dict(module.named_parameters()) if module is not None else {}
        self.buffers = dict(module.named_buffers()) if module is not None else {}
        self.args, self.kwargs = instance.inputs()
        named = input_names(instance.subject.model, self.args, self.kwargs)
        self.given = {f"input.{name}": value for name, value in named if isinstance(value, Tensor)}
        self.asking = self._outputs_that_ask()
        self.traced = _Traced()

    def _outputs_that_ask(self) -> dict[str, Tensor]:
        """Return a cotangent for each output that asks for a gradient."""
        self.instance.restore()
        with torch.enable_grad():
            named = _named(self.instance.model(*self.args, **self.kwargs))
        self.instance.restore()
        self.args, self.kwargs = self.instance.inputs()
        named_inputs = input_names(self.instance.subject.model, self.args, self.kwargs)
        self.given = {f"input.{name}": value for name, value in named_inputs if isinstance(value, Tensor)}
        return {name: torch.randn_like(value) for name, value in named if value.requires_grad}

    @property
    def names(self) -> list[str]:
        """Return the names of what the function takes."""
        cotangents = [f"grad_{name}" for name in self.asking]
        return [*self.parameters, *self.buffers, *self.given, *cotangents]

    @property
    def tensors(self) -> list[Tensor]:
        """Return what it takes now."""
        values = (*self.parameters.values(), *self.buffers.values(), *self.given.values(), *self.asking.values())
        return [value.detach().clone(memory_format=torch.contiguous_format) for value in values]

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        """Return outputs, gradients and buffers that changed, in the order that ``traced`` tells."""
        values = dict(zip(self.names, flat, strict=True))
        with torch.enable_grad():
            weights = {name: self._leaf(values[name], old) for name, old in self.parameters.items()}
            kept = {name: values[name].clone() for name in self.buffers}
            given = {name: self._input(values[name], old) for name, old in self.given.items()}
            replaced = {f"model.{name}": value for name, value in {**weights, **kept}.items()}

            def act(model: Callable[..., Any]) -> list[Tensor]:
                return self._forward_and_backward(model, weights, kept, given, values)

            found: list[Tensor] = functional_call(self.step, replaced, (act,))
            return found

    def _forward_and_backward(
        self,
        model: Callable[..., Any],
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        given: Mapping[str, tuple[Tensor, Tensor]],
        values: Mapping[str, Tensor],
    ) -> list[Tensor]:
        pending = iter([each for _, each in given.values()])
        versions = {name: each._version for name, (_, each) in given.items()}
        args, kwargs = map_leaves(
            lambda _, leaf: next(pending) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        seed_generators(self.instance.subject.seed)
        outputs = dict(_named(model(*args, **kwargs)))
        for name, (_, each) in given.items():
            if each._version != versions[name]:
                raise CannotJoin(f"the model writes to its input {name.removeprefix('input.')!r}, which no graph can.")
        leaves_by_name = {**weights, **{name: leaf for name, (leaf, _) in given.items()}}
        wanted = {name: leaf for name, leaf in leaves_by_name.items() if leaf.requires_grad}
        asking = {name: outputs[name] for name in self.asking}
        cotangents = [values[f"grad_{name}"] for name in asking]
        found = torch.autograd.grad(list(asking.values()), list(wanted.values()), cotangents, allow_unused=True)
        gradients = {f"grad.{name}": each for name, each in zip(wanted, found, strict=True) if each is not None}
        module = module_of(model)
        now = dict(module.named_buffers()) if module is not None else {}
        updated = {
            f"updated.{name}": now[name]
            for name, value in kept.items()
            if name in now and (now[name] is not value or value._version)
        }
        self.traced = _Traced(list(outputs), list(gradients), list(updated))
        results = (*outputs.values(), *gradients.values(), *updated.values())
        return [each.detach().clone() for each in results]

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


def joint_program(instance: Instance) -> Joint:
    """Return forward and backward of a model in one program.

    Args:
        instance: a private copy, with its hooks.

    Raises:
        CannotJoin: torch cannot trace the model, or a step of it is not the same in every call.
    """
    try:
        subject = _Subject(instance)
        if not subject.asking:
            raise CannotJoin("no output asks for a gradient.")
        tensors = subject.tensors
        with sdpa_kernel(SDPBackend.MATH):
            traced = make_fx(subject, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
            found = subject.traced
            graph = make_fx(
                functionalize(traced, remove="mutations"),
                tracing_mode="fake",
                decomposition_table={**core_aten_decompositions(), **TABLE},
                _allow_non_fake_inputs=True,
            )(*tensors)
        instance.restore()
        _clean(graph, subject.names)
        _ensure_repeats(graph)
        program = torch.export.export(graph, tuple(tensors), strict=False)
    except CannotJoin:
        raise
    except Exception as error:  # tracing may raise anything, and so may the user's model
        if is_out_of_memory(error):
            raise
        raise CannotJoin(
            f"forward and backward cannot be traced: {first_line(error)}", traceback.format_exc()
        ) from error
    changed = {name.removeprefix("updated.") for name in found.updated}
    return Joint(
        program,
        tuple(subject.names),
        (*found.outputs, *found.gradients, *found.updated),
        {**subject.parameters, **subject.buffers},
        tuple(name for name in subject.buffers if name not in changed),
    )


def _named(value: Any) -> list[tuple[str, Tensor]]:
    return [(output_name(path), leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]


def _clean(graph: fx.GraphModule, names: Sequence[str]) -> None:
    """Take out what is for autograd alone, and call inputs what the user calls them."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _DROPPED:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.target = node.name = re.sub(r"\W", "_", name)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _ensure_repeats(graph: fx.GraphModule) -> None:
    """Raise for an operator that draws random numbers: a graph of it would give others than eager."""
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise CannotJoin(
                f"the forward draws random numbers ({node.target}); switch to eval mode, or draw them outside."
            )
