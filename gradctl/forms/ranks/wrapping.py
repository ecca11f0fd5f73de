"""How a rank arranges its copy of the model: DDP and FSDP as their tutorials do, tensor parallelism by a plan, or the
user's own ``parallelize``.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gradctl.core.errors import listed, nearest
from gradctl.forms.form import CannotCapture
from gradctl.subject.signature import module_of
from gradctl.subject.subject import Subject

_SIGNATURE = "parallelize(model, mesh) -> model"


class GradientAllReduce(ParallelStyle):
    """A module whose parameters each rank has whole, and whose gradients are sums over the ranks: it sees this rank's
    heads only (transformers' ``replicated_with_grad_allreduce``).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def sum_over_ranks(parameter: Tensor) -> None:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=device_mesh.get_group())

        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(sum_over_ranks)  # type: ignore[no-untyped-call]
        return module


# The names of transformers' plans; torch's objects may stand in a plan, too.
_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "sequence_parallel": SequenceParallel,
    "replicated_with_grad_allreduce": GradientAllReduce,
}


def ensure_wrappable(kind: str, subject: Subject, model: Any) -> None:
    """Raise if a model cannot be arranged in this way, before any rank is started.

    Raises:
        CannotCapture: with the reason.
    """
    if kind == "ranks":
        function = subject.beside.get("parallelize")
        if not callable(function):
            said = "the file of the target" if function is None else f"instead of {type(function).__name__!r}"
            raise CannotCapture(f"ranks:N needs a function {_SIGNATURE} in {said}. Write one, or use ddp, fsdp or tp.")
        return
    if module_of(model) is None:
        raise CannotCapture(f"{kind} wraps an nn.Module, and the target is a function. Write {_SIGNATURE} for ranks:N.")
    if kind == "tp":
        tensor_plan(subject, model)


def wrap(kind: str, subject: Subject, model: Any, mesh: DeviceMesh, called: Collection[str]) -> Any:
    """Return the model of this rank; the one that is given may be changed.

    Args:
        kind: ``ddp``, ``fsdp``, ``tp`` or ``ranks``.
        subject: with what is beside the target.
        model: a private copy.
        mesh: of all ranks, with one dimension.
        called: names of the modules that the model calls, of which FSDP can shard each.

    Raises:
        CannotCapture: ``parallelize`` returns no model.
        Exception: what the user's ``parallelize`` raises.
    """
    if kind == "ranks":
        wrapped = subject.beside["parallelize"](model, mesh)
        if not callable(wrapped):
            kind_of = "nothing" if wrapped is None else f"{type(wrapped).__name__!r}"
            raise CannotCapture(f"parallelize returns {kind_of} instead of the model; end it in 'return model'.")
        return wrapped
    module = module_of(model)
    assert module is not None
    if kind == "ddp":
        if not any(each.requires_grad for each in module.parameters()):
            raise CannotCapture("DDP wraps a model with parameters that require a gradient, and this one has none.")
        return DistributedDataParallel(module, find_unused_parameters=True)
    if kind == "fsdp":
        for block in _blocks(module, called):
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    tied = _tied(module)
    parallelize_module(module, mesh, tensor_plan(subject, model))
    _tie_again(module, tied)
    return module


def _blocks(module: nn.Module, called: Collection[str]) -> list[nn.Module]:
    """Return the blocks that FSDP gathers one by one: what a ModuleList repeats and the model calls.

    Parameters that a block shares with the rest of the model stay in the root.
    """
    found: dict[str, nn.Module] = {}
    for name, each in module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        parent = module.get_submodule(name.rpartition(".")[0])
        if (
            isinstance(parent, nn.ModuleList)
            and not is_inside
            and name in called
            and any(True for _ in each.parameters())
        ):
            found[name] = each
    owners: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = next((block for block in found if name.startswith(f"{block}.")), "")
        owners.setdefault(id(parameter), set()).add(owner)
    tied = {owner for each in owners.values() if len(each) > 1 for owner in each}
    return [each for name, each in found.items() if name not in tied]


def _tied(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def _tie_again(module: nn.Module, tied: list[list[str]]) -> None:
    """Let parameters that were tied be one object again: a plan divides each by itself.

    Raises:
        CannotCapture: it divides them in different ways.
    """
    for first, *others in tied:
        own = module.get_parameter(first)
        for name in others:
            other = module.get_parameter(name)
            if getattr(own, "placements", None) != getattr(other, "placements", None):
                raise CannotCapture(
                    f"tp_plan divides {name} and {first}, which are tied, in different ways: they would no longer be "
                    "tied. Give their modules styles that divide the weight alike, or leave both out."
                )
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, own)


def tensor_plan(subject: Subject, model: Any) -> dict[str, ParallelStyle]:
    """Return the plan of tensor parallelism that the target's file or the model states, by path of the module.

    It is ``tp_plan`` beside the target, or an attribute ``tp_plan`` or ``_tp_plan`` of the model: styles of
    ``torch.distributed.tensor.parallel``, or their names in transformers, by patterns of paths.

    Raises:
        CannotCapture: there is no plan, it names no module, or a style is not known.
    """
    module = module_of(model)
    given = subject.beside.get("tp_plan")
    for name in ("tp_plan", "_tp_plan"):
        given = given or getattr(module, name, None)
    if callable(given) and not inspect.isclass(given):
        given = given()
    if not isinstance(given, Mapping) or not given or module is None:
        raise CannotCapture(
            "the target states no plan of tensor parallelism. Write tp_plan = {'layers.*.linear1': 'colwise', "
            "'layers.*.linear2': 'rowwise'} beside it, or parallelize(model, mesh) for ranks:N."
        )
    names = [name for name, _ in module.named_modules()]
    plan: dict[str, ParallelStyle] = {}
    for pattern, style in given.items():
        if isinstance(style, str) and style not in _STYLES:
            raise CannotCapture(
                f"tp_plan has the style {style!r} for {pattern!r}; known are {listed(list(_STYLES), len(_STYLES))}."
            )
        matched = [name for name in names if _matches(name, pattern)]
        if not matched:
            raise CannotCapture(
                f"tp_plan names {pattern!r}, and the model has no such module{nearest(pattern, names)}."
            )
        plan |= {name: _STYLES[style]() if isinstance(style, str) else style for name in matched}
    return plan


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
