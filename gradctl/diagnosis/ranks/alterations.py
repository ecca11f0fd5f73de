"""What an experiment changes in each rank: the derivative of a collective, a missing sum, the weight of a loss.

An alteration is called in the forked process of a rank, once the model is arranged there. What it changes is never put
back: the process ends with the experiment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from gradctl.forms.ranks.rank_program import RankProgram
from gradctl.subject.frames import is_users, user_location
from gradctl.tracing.functions import is_torch_own
from gradctl.tracing.semantics import differentiably
from gradctl.tracing.tracer import Apply, FunctionClass, Tracer

Alter = Callable[[RankProgram], None]
# Of the outputs of modules that a rank sends, in float64: 64 MB.
_MOST_ELEMENTS = 8_000_000
Back = Callable[[Tensor], Tensor]
# What wrappers of torch put between a model and its modules, in their names.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class WithBackward(Function):
    """The value of a function of one tensor, with a backward of its own: ``apply(x, forward, backward)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Back, backward: Back) -> Tensor:
        """Return ``forward`` of a copy of ``x``."""
        ctx.back = backward
        return forward(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return ``backward`` of a copy of the gradient."""
        return ctx.back(gradients[0].clone()), None, None


def same(x: Tensor) -> Tensor:
    """Return the tensor."""
    return x


def summed(x: Tensor, group: Any = None) -> Tensor:
    """Return the sum over the ranks."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def watch_modules(program: RankProgram) -> None:
    """Note what each module of a rank takes and returns, and the gradient of what it returns."""
    observe_modules(program.model, lambda: program.record.observed)


def observe_modules(model: Any, into: Callable[[], dict[str, Any]]) -> None:
    """Note, by name, the first input and the output of each module in its first call, and the output's gradient."""

    def see(name: str, args: Any, output: Any) -> None:
        found = into()
        outputs = found.setdefault("outputs", {})
        if type(output) is not Tensor or not output.is_floating_point() or name in outputs:
            return
        if sum(each.numel() for each in outputs.values()) > _MOST_ELEMENTS:
            return
        outputs[name] = output.detach().clone()
        given = next((each for each in args if type(each) is Tensor), None)
        if given is not None:
            found.setdefault("inputs", {})[name] = given.detach().clone()
        if output.requires_grad:
            cotangents = found.setdefault("cotangents", {})
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: cotangents.__setitem__(name, gradient.detach().clone())
            )

    for name, module in dict(named_modules(model)).items():
        module.register_forward_hook(lambda _, args, output, name=name: see(name, args, output))


def named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by the names that they have in the user's, without wrappers."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare or not name:
            yield bare, module


def on_outputs(module: str, change: Callable[[nn.Module, Tensor], Tensor]) -> Alter:
    """Return the alteration that changes the tensor that a module returns."""

    def alter(program: RankProgram) -> None:
        # Of a wrapper and what it wraps, which have one name, the last is the user's.
        dict(named_modules(program.model))[module].register_forward_hook(
            lambda owner, _, output: change(owner, output) if isinstance(output, Tensor) else output
        )

    return alter


def sum_output(module: str, *, has_bias: bool) -> Alter:
    """Return the alteration that sums what a module returns over the ranks; a bias that each has added counts once."""

    def change(owner: nn.Module, output: Tensor) -> Tensor:
        bias = owner.bias if has_bias else None
        partial = output - bias if isinstance(bias, Tensor) else output
        whole: Tensor = WithBackward.apply(partial, summed, same)  # type: ignore[no-untyped-call]
        return whole + bias if isinstance(bias, Tensor) else whole

    return on_outputs(module, change)


def change_gradient(module: str, back: Back) -> Alter:
    """Return the alteration that changes the gradient of what a module returns."""

    def change(_: nn.Module, output: Tensor) -> Tensor:
        value: Tensor = WithBackward.apply(output, same, back)  # type: ignore[no-untyped-call]
        return value

    return on_outputs(module, change)


def gather_inputs(module: str, axis: int) -> Alter:
    """Return the alteration that lets a module compute on the inputs of all ranks, and return its own part."""

    def alter(program: RankProgram) -> None:
        owner = dict(named_modules(program.model))[module]
        forward, rank, world = owner.forward, program.rank.number, program.rank.world

        def whole(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() <= axis:
                return x
            return torch.cat(list(gathered(x, None, dist.all_gather, sums=True)), axis)

        def forward_whole(*args: Any, **kwargs: Any) -> Any:
            output = forward(*map(whole, args), **{name: whole(each) for name, each in kwargs.items()})
            return output.chunk(world, axis)[rank]

        owner.forward = forward_whole

    return alter


def weigh_loss(weights: Sequence[float]) -> Alter:
    """Return the alteration that multiplies the scalars that a rank returns by its weight."""

    def alter(program: RankProgram) -> None:
        weight = weights[program.rank.number]

        def change(*_: Any) -> Any:
            output = _[-1]
            return output * weight if isinstance(output, Tensor) and not output.dim() else output

        if isinstance(program.model, nn.Module):
            program.model.register_forward_hook(change)

    return alter


# ------------------------------------------------------------------ collectives and Functions


def differentiate_collectives(sums: bool | None) -> Alter:
    """Return the alteration that gives a backward to collectives that have none: ``all_reduce`` and ``all_gather``.

    Args:
        sums: whether the backward sums over the ranks, as it must if each has a loss of its own; if not, each rank has
            the same loss, and keeps its own part of the gradient. None: the calls are noted only.
    """

    def alter(program: RankProgram) -> None:
        reduce, gather = dist.all_reduce, dist.all_gather

        def is_cut(tensor: Tensor, name: str) -> bool:
            if not (torch.is_grad_enabled() and tensor.requires_grad):
                return False
            program.record.observed.setdefault("cuts", {}).setdefault(name, user_location())
            return sums is not None

        def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: Any = False) -> Any:
            if async_op or not is_cut(tensor, "all_reduce"):
                return reduce(tensor, op, group, async_op)

            def run(x: Tensor) -> Tensor:
                x = x.contiguous()
                reduce(x, op, group)
                return x

            if op != dist.ReduceOp.SUM:  # a maximum that is subtracted in a softmax: the gradient of the whole is zero
                reduce(tensor.detach_().data, op, group)
                return None
            tensor.copy_(WithBackward.apply(tensor.clone(), run, run if sums else same))  # type: ignore[no-untyped-call]
            return None

        def all_gather(parts: list[Tensor], tensor: Tensor, group: Any = None, async_op: Any = False) -> Any:
            if async_op or not is_cut(tensor, "all_gather"):
                return gather(parts, tensor, group, async_op)
            for part, value in zip(parts, gathered(tensor, group, gather, sums=bool(sums)), strict=True):
                part.copy_(value)
            return None

        _replace(dist, "all_reduce", all_reduce)
        _replace(dist, "all_gather", all_gather)

    return alter


def gathered(x: Tensor, group: Any, gather: Callable[..., Any], *, sums: bool) -> Tensor:
    """Return the tensors of all ranks, stacked on a new first axis, with a backward."""

    def forward(own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        gather(parts, own.contiguous(), group)
        return torch.stack(parts)

    def back(gradient: Tensor) -> Tensor:
        return (summed(gradient, group) if sums else gradient)[dist.get_rank(group)]

    value: Tensor = WithBackward.apply(x, forward, back)  # type: ignore[no-untyped-call]
    return value


def _replace(holder: Any, name: str, function: Any) -> None:
    """Replace a function of torch, also where the user's modules have imported it by name."""
    original = getattr(holder, name)
    setattr(holder, name, function)
    for module in list(sys.modules.values()):
        if is_users(getattr(module, "__file__", None) or "<"):
            for key in [key for key, each in vars(module).items() if each is original]:
                setattr(module, key, function)


class _Functions(Tracer):
    """Notes the custom Functions that a rank applies; of one, the forward is differentiated instead."""

    def __init__(self, seen: dict[str, Any], replaced: str | None) -> None:
        super().__init__()
        self._seen, self._replaced = seen, replaced

    def apply(self, function: FunctionClass, apply: Apply, args: tuple[Any, ...]) -> Any:
        """Apply a Function, or differentiate its forward."""
        is_collective = function.__module__.startswith("torch.distributed.nn")
        if function is WithBackward or (is_torch_own(function) and not is_collective):
            return apply(*args)
        name = f"{function.__module__}.{function.__qualname__}"
        self._seen.setdefault(name, user_location())
        with self.body_hidden():
            return differentiably(function, args) if name == self._replaced else apply(*args)


def within(context: Callable[[RankProgram], AbstractContextManager[Any]]) -> Alter:
    """Return the alteration that enters a context around the forward."""

    def alter(program: RankProgram) -> None:
        called = program.model.forward if isinstance(program.model, nn.Module) else program.model

        def call(*args: Any, **kwargs: Any) -> Any:
            with context(program):
                return called(*args, **kwargs)

        if isinstance(program.model, nn.Module):
            program.model.forward = call
        else:
            program.model = call

    return alter


def watch_functions(replaced: str | None = None) -> Alter:
    """Return the alteration that notes the Functions of the user's, and differentiates the forward of one."""

    def context(program: RankProgram) -> AbstractContextManager[Any]:
        tracer, stack = _Functions(program.record.observed.setdefault("functions", {}), replaced), ExitStack()
        stack.enter_context(tracer.functions())
        stack.enter_context(tracer)
        return stack

    return within(context)


def both(*alterations: Alter) -> Alter:
    """Return several alterations as one."""

    def alter(program: RankProgram) -> None:
        for each in alterations:
            each(program)

    return alter
