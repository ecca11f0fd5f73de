"""Forward and backward of a model as one function of flat tensors, which is traced.

Names of its inputs and outputs are those of the joint graph; see ``gradctl.joint.capture``.

Private to torch (seen in 2.10 to 2.14): ``torch.fx.experimental.symbolic_shapes``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gradctl.core.errors import TargetError, nearest
from gradctl.core.names import input_name, output_name, parameter_name
from gradctl.joint.detached import DetachedValues
from gradctl.joint.export_error import JointExportError
from gradctl.joint.optimizer_update import NEXT, OptimizerUpdate
from gradctl.joint.provenance import Places
from gradctl.joint.random_inputs import RandomInput, RandomInputs, forbid_other_generators
from gradctl.joint.recurrent import ScannedLayers
from gradctl.numerics.measures import same_values
from gradctl.subject.inputs.example import input_names
from gradctl.subject.instance import Instance
from gradctl.subject.seeding import seed_generators
from gradctl.subject.signature import module_of
from gradctl.subject.tree import leaves, map_leaves

_Result = TypeVar("_Result")
_Results = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]  # outputs, gradients, updates by name

_FEW = 8  # names that a message lists


class _Model(nn.Module):
    """A module that calls a function of the model: its backward too runs while functional_call has the parameters."""

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[Any], Any]) -> Any:
        return act(self.model)


@dataclass(slots=True)
class _Traced:
    """Names of the results of one step, in their order."""

    outputs: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)


class TrainingStep:
    """Forward and backward of a model as a function of flat tensors; the model of the private copy is run once."""

    def __init__(self, instance: Instance, wrt: Sequence[str] = ("*",), update: OptimizerUpdate | None = None) -> None:
        self.instance, self.wrt, self.update = instance, wrt, update
        self.model, self.places = _Model(instance.model), Places()
        module = module_of(instance.model)
        self.parameters = dict(module.named_parameters()) if module is not None else {}
        self.buffers = dict(module.named_buffers()) if module is not None else {}
        instance.restore()
        args, kwargs = instance.inputs()
        state = {**self.parameters, **self.buffers}
        before = {name: value.detach().clone() for name, value in state.items()}
        seed_generators(instance.subject.seed)
        with instance.preserve_leaves():
            with torch.enable_grad(), forbid_other_generators(), RandomInputs(instance.model) as draws:
                named = _named(instance.model(*args, **kwargs))
            # BatchNorm writes its running statistics without counting up their version.
            self.written = {name for name, value in state.items() if not same_values(value, before[name])}
        self.random_inputs = draws.by_name
        self.is_differentiable = any(value.requires_grad for _, value in named)
        has_cotangents = bool(wrt) and update is None
        self.cotangents = {
            name: torch.randn_like(value) for name, value in named if value.requires_grad and has_cotangents
        }
        self.optimizer_state = update.state(self.parameters) if update is not None else {}
        instance.restore()
        self.args, self.kwargs = instance.inputs()
        inputs = input_names(instance.subject.model, self.args, self.kwargs)
        self.given = {f"input.{name}": value for name, value in inputs if isinstance(value, Tensor)}
        self.traced = _Traced()

    @property
    def names(self) -> list[str]:
        """Return the names of the inputs."""
        cotangents = [f"grad_{name}" for name in self.cotangents]
        state = (*self.parameters, *self.buffers, *self.optimizer_state)
        return [*state, *self.given, *self.random_inputs, *cotangents]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the current inputs."""
        drawn = [draw.again() for draw in self.random_inputs.values()]
        state = {**self.parameters, **self.buffers, **self.optimizer_state, **self.given}
        values = (*state.values(), *drawn, *self.cotangents.values())
        return [value.detach().clone(memory_format=torch.contiguous_format) for value in values]

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        """Return outputs, gradients, and changed parameters and buffers, in the order of the names in ``traced``."""
        values = dict(zip(self.names, flat, strict=True))
        with torch.enable_grad():
            weights, kept = self._state(values)
            given = {name: self._input(values[name], old) for name, old in self.given.items()}

            def act(model: Callable[..., Any]) -> list[Tensor]:
                outputs = self._outputs(model, {name: each for name, (_, each) in given.items()})
                wanted = {**weights, **{name: leaf for name, (leaf, _) in given.items()}}
                gradients = self._gradients(outputs, wanted, values)
                updated = _updated(model, kept, self.written)
                updated |= {f"updated.{name}": leaf for name, leaf in weights.items() if name in self.written}
                if self.update is not None:
                    found = self._next(self.update, weights, values, (outputs, gradients, updated))
                    outputs, gradients, updated = found
                self.traced = _Traced(list(outputs), list(gradients), list(updated))
                results = (*outputs.values(), *gradients.values(), *updated.values())
                return [each.detach().clone() for each in results]

            return self._with({**weights, **kept}, [values[name] for name in self.random_inputs], act)[0]

    def forward(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, RandomInput]]:
        """Return the outputs by name, for parameters, buffers and inputs by name; and the random numbers."""
        with torch.enable_grad():
            weights, kept = self._state(values)
            inputs = {name: self._input(values[name], old)[1] for name, old in self.given.items()}
            return self._with({**weights, **kept}, None, lambda model: self._outputs(model, inputs))

    def _state(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the parameters as leaves, and the buffers; copies of those that the forward may write to."""
        now = {name: values[name].clone() if name in self.written else values[name] for name in self.parameters}
        weights = {name: self._leaf(now[name], old) for name, old in self.parameters.items()}
        return weights, {name: values[name].clone() for name in self.buffers}

    def _with(
        self, state: Mapping[str, Tensor], drawn: Sequence[Tensor] | None, act: Callable[[Any], _Result]
    ) -> tuple[_Result, dict[str, RandomInput]]:
        """Return the result of ``act`` for the model with this state and these random numbers; and the latter."""
        seed_generators(self.instance.subject.seed + 1)  # not the seed of a run: a model that sets it must be noticed
        with self.places, RandomInputs(self.instance.model, drawn) as draws, ScannedLayers():
            found = functional_call(self.model, {f"model.{name}": each for name, each in state.items()}, (act,))
        return found, draws.by_name

    def _outputs(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pending = iter(inputs.values())
        versions = {name: each._version for name, each in inputs.items()}
        args, kwargs = map_leaves(
            lambda _, leaf: next(pending) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        # The backward of a joint graph leaves out what the program detaches; a later backward of the forward does not.
        with nullcontext() if self.wrt else DetachedValues():
            outputs = dict(_named(model(*args, **kwargs)))
        if free_unbacked_symbols(list(outputs.values())):
            raise JointExportError(self.places.sized)
        for name, each in inputs.items():
            if each._version != versions[name]:
                own = name.removeprefix("input.")
                place = self.places.writes.get(each.untyped_storage()._cdata, "")
                message = f"the model writes to its input {own!r}{place}, which no graph can: clone it first."
                raise JointExportError(message)
        return outputs

    def _gradients(
        self, outputs: Mapping[str, Tensor], leaves_by_name: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if not self.wrt:
            return {}
        wanted = self._differentiated(leaves_by_name)
        roots = [outputs[name] for name in self.cotangents]
        cotangents = [values[f"grad_{name}"] for name in self.cotangents]
        if self.update is not None:
            roots, cotangents = [outputs[self.update.loss]], [torch.ones_like(outputs[self.update.loss])]
        # As in training: reentrant checkpoints reject autograd.grad.
        torch.autograd.backward(roots, cotangents)
        return {f"grad.{name}": leaf.grad for name, leaf in wanted.items() if leaf.grad is not None}

    def _next(
        self, update: OptimizerUpdate, weights: Mapping[str, Tensor], values: Mapping[str, Tensor], found: _Results
    ) -> _Results:
        """Return the loss, the gradients if they are outputs, and the next parameters, state and buffers."""
        outputs, gradients, updated = found
        own: Mapping[str, Tensor] = {name: gradients[f"grad.{name}"] for each in update.groups for name in each.names}
        with torch.no_grad():
            own = update.clip(own)
            following = update({name: weights[name] for name in own}, own, values)
        buffers = {f"{NEXT}{name.removeprefix('updated.')}": each for name, each in updated.items()}
        kept = {f"grad.{name}": each for name, each in own.items()} if update.keeps_gradients else {}
        return {"loss": outputs[update.loss]}, kept, {**buffers, **following}

    def _differentiated(self, leaves_by_name: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the leaves that ``wrt`` names and that require a gradient.

        Raises:
            TargetError: GC104 if ``wrt`` matches no such leaf.
        """
        names = {name: self._report_name(name) for name, leaf in leaves_by_name.items() if leaf.requires_grad}
        wanted = {name for pattern in self.wrt for name in names if fnmatch.fnmatchcase(names[name], pattern)}
        if not wanted:
            there = list(names.values())
            raise TargetError(
                "GC104",
                f"--wrt {' '.join(self.wrt)} matches nothing that requires a gradient"
                f"{nearest(self.wrt[0], there)}: there are {', '.join(there[:_FEW]) or 'none'}.",
            )
        return {name: leaves_by_name[name] for name in names if name in wanted}

    def _report_name(self, name: str) -> str:
        return input_name(name.removeprefix("input.")) if name in self.given else parameter_name(name)

    def _leaf(self, value: Tensor, old: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_(old.requires_grad)
        for hook in (old._backward_hooks or {}).values():
            leaf.register_hook(hook)  # type: ignore[no-untyped-call]
        return leaf

    def _input(self, value: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Return an input as the leaf that accumulates its gradient, and as the model receives it."""
        requires_grad = self.instance.input_mode != "constant" and (old.is_floating_point() or old.is_complex())
        leaf = value.detach().requires_grad_(requires_grad)
        return leaf, leaf.clone() if self.instance.input_mode == "clone" or not requires_grad else leaf


def _updated(model: Callable[..., Any], kept: Mapping[str, Tensor], written: Set[str]) -> dict[str, Tensor]:
    """Return the buffers that a call has written to or replaced, and those in ``written``."""
    module = module_of(model)
    now = dict(module.named_buffers()) if module is not None else {}
    return {
        f"updated.{name}": now[name]
        for name, value in kept.items()
        if name in now and (now[name] is not value or value._version or name in written)
    }


def _named(value: Any) -> list[tuple[str, Tensor]]:
    return [(output_name(path), leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor)]
