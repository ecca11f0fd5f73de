"""One custom Function at recorded inputs, as the oracle judges it, and how findings name it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gradctl.core.findings import Finding
from gradctl.gradients.part import Cotangents, Part, differentiable, gaussian
from gradctl.numerics.runner import Outputs
from gradctl.subject.instance import Leaf
from gradctl.subject.seeding import seed_generators
from gradctl.subject.torch_private import FunctionBase, tree_unflatten
from gradctl.tracing.functions import FunctionCall, is_registered_operator
from gradctl.tracing.model_runner import ModelRunner

# Layouts of one cotangent must give one gradient, but for the order of summation.
_SAME = 1e-9
_SAME_ON_AN_ISLAND = 1e-3
_TRANSFORMS = "torch._functorch.autograd_function"


@dataclass(frozen=True, slots=True)
class FunctionFault:
    """What is wrong with a Function."""

    function: type[Function]
    rule: str  # ``first``, ``memory``, ``state``, ``linear``, ``layout``, ``forward-mode`` or ``second``
    message: str  # a sentence without a full stop
    error: float | None = None  # relative, summed over its inputs if several are wrong
    # What a caller must do for it to matter: an ``expanded``, ``strided`` or ``shared`` cotangent, one that is
    # ``undefined``, an input that is ``frozen``, ``forward-mode``, ``second-order``; None if any does.
    caller: str | None = None
    position: int | None = None  # of the argument that requires no gradient


def fault_size(found: Finding | FunctionFault) -> float:
    """Return the size of what is wrong with a Function, relative; -1 if it has none."""
    return found.error if isinstance(found.error, float) else -1.0


def users_class(function: type[Function]) -> type[Function]:
    """Return the user's class behind the one that torch makes of it for ``vmap`` (torch 2.10 to 2.14)."""
    while function.__module__ == _TRANSFORMS and "autograd_function" in (made := _closed_over(function)):
        function = made["autograd_function"]
    return function


def function_name(function: type[Function]) -> str:
    """Return the name that findings and ``--allow`` use: the class's, or ``library::op`` of a registered custom op."""
    function = users_class(function)
    if is_registered_operator(function):
        schema = _of_registered_op(function, "op")._schema
        return str(schema.name)
    return function.__name__


def source_place(function: type[Function]) -> tuple[str, int] | None:
    """Return file and line of a Function's backward."""
    function = users_class(function)
    backward: Any = function.backward if function.backward is not Function.backward else function.vjp
    if is_registered_operator(function):  # torch wraps what was given to register_autograd
        backward = _of_registered_op(function, "info")._backward_fn
    code = getattr(inspect.unwrap(backward), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code is not None else None


def _of_registered_op(function: type[Function], name: str) -> Any:
    """Return what torch's generated backward closes over: ``op``, the operator, or ``info``, what was registered."""
    closed_over = _closed_over(function)
    if "orig_backward" in closed_over:  # an operator that takes or returns lists of tensors is wrapped once more
        closed_over = inspect.getclosurevars(closed_over["orig_backward"]).nonlocals
    return closed_over[name]


def _closed_over(function: type[Function]) -> Mapping[str, Any]:
    return inspect.getclosurevars(function.backward).nonlocals


def _flat_apply(function: type[Function]) -> Callable[..., Any]:
    """Return the ``apply`` that takes what a call recorded: of an operator on lists of tensors, those flattened."""
    if is_registered_operator(function):
        flat: Callable[..., Any] = FunctionBase.__dict__["apply"].__get__(None, function)
        return flat
    return function.apply


class FunctionPart(Part):
    """One Function at recorded inputs; ``off`` is the index of a leaf that requires no gradient."""

    def __init__(self, call: FunctionCall, model: ModelRunner, off: int | None = None) -> None:
        self.function, self.args, self.model, self.off = call.function, call.args, model, off
        # A sparse argument is a constant here: there is no direction to move it along that keeps it sparse.
        self.positions = [
            i
            for i, arg in enumerate(call.args)
            if isinstance(arg, Tensor) and arg.requires_grad and arg.layout == torch.strided
        ]
        self._all = [
            Leaf(argument_name(call, i), call.args[i].detach().clone().requires_grad_(), call.args[i].dtype)
            for i in self.positions
        ]
        self.leaves = [leaf for k, leaf in enumerate(self._all) if k != off]

    def evaluate(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the outputs, from the same random numbers each time."""
        inputs = list(tensors)
        if self.off is not None:
            inputs.insert(self.off, self._all[self.off].tensor.detach())
        given = dict(zip(self.positions, inputs, strict=True))
        args = [given.get(i, arg.clone() if isinstance(arg, Tensor) else arg) for i, arg in enumerate(self.args)]
        seed_generators(self.model.instance.subject.seed)
        with torch.enable_grad(), self.model.promoted():
            result = _flat_apply(self.function)(*args)
        results = result if isinstance(result, tuple) else (result,)
        return [(f"output.{k}", t) for k, t in enumerate(results) if isinstance(t, Tensor)]

    def promoted(self) -> AbstractContextManager[None]:
        """Return the model's context of a backward."""
        return self.model.promoted()

    def outputs(self) -> list[Tensor]:
        """Return the outputs that a dense cotangent can be given for."""
        return list(differentiable(self.differentiate()).values())

    def gradients(self, cotangents: Cotangents) -> list[Tensor | None]:
        """Return the VJP of what ``cotangents`` makes of the differentiable outputs."""
        outputs = self.outputs()
        handed = cotangents(outputs)  # drawn in float64: under the promotion, draws are rounded as the model's own are
        return self.pull(outputs, handed)

    @property
    def same(self) -> float:
        """How much gradients may differ by the order of a sum, relative."""
        return _SAME if self._is_float64 else _SAME_ON_AN_ISLAND

    @property
    def ulp(self) -> float:
        """Machine epsilon of the dtype in which the Function computes."""
        return torch.finfo(torch.float64 if self._is_float64 else torch.float32).eps

    @property
    def _is_float64(self) -> bool:
        promotion = self.model.promotion
        return promotion is not None and not promotion.islands

    def fault(self, rule: str, said: str, error: float | None = None, caller: str | None = None) -> FunctionFault:
        """Return a fault of this Function: what ``said`` says of its backward."""
        return FunctionFault(self.function, rule, f"{function_name(self.function)}.backward {said}", error, caller)


class DoubleBackward(Part):
    """(inputs, cotangents) ↦ VJP of a Function: its derivative is the double backward."""

    def __init__(self, part: FunctionPart) -> None:
        self.part = part
        cotangents = enumerate(gaussian(part.outputs()))
        self.leaves = [*part.leaves, *(Leaf(f"cotangent.{k}", w.requires_grad_(), w.dtype) for k, w in cotangents)]

    def evaluate(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the VJP of these inputs and cotangents, with its graph."""
        count = len(self.part.leaves)
        with torch.enable_grad():
            passed = [x.clone() for x in tensors[:count]]
        outputs = differentiable(self.part.evaluate(passed)).values()
        with torch.enable_grad(), self.promoted():
            found = torch.autograd.grad(
                list(outputs), tensors[:count], tensors[count:], create_graph=True, allow_unused=True
            )
        return [(f"vjp.{k}", t) for k, t in enumerate(found) if t is not None and t.requires_grad]

    def promoted(self) -> AbstractContextManager[None]:
        """Return the model's context of a backward."""
        return self.part.promoted()


def _operator_argument(call: FunctionCall) -> dict[int, str]:
    """Return the names of the arguments of a registered operator by position."""
    names = [argument.name for argument in _of_registered_op(call.function, "op")._schema.arguments]
    spec = getattr(call.args[-1], "input_spec", None)  # there for an operator on lists of tensors
    places = tree_unflatten(list(range(spec.num_leaves)), spec) if spec is not None else range(len(names))
    found: dict[int, str] = {}
    for name, place in zip(names, places, strict=False):
        found |= {at: f"{name}.{k}" for k, at in enumerate(place)} if isinstance(place, list) else {place: name}
    return found


def argument_name(call: FunctionCall, position: int) -> str:
    """Return the name of an argument of ``forward``, past its ``ctx``; ``xs.0`` in a list of an operator's."""
    function = call.function
    if is_registered_operator(function):
        return _operator_argument(call).get(position, f"args.{position}")
    parameters = list(inspect.signature(function.forward).parameters.values())
    if function.setup_context is Function.setup_context:
        parameters = parameters[1:]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional[position] if position < len(positional) else f"args.{position}"
