"""One run of a model on many ranks: forward and backward, whose results are made whole here, in the parent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradctl.core.errors import listed
from gradctl.core.names import buffer_name, parameter_name
from gradctl.forms.form import CannotCapture, named_tensors
from gradctl.forms.ranks.processes import RankFailed, RankProcesses
from gradctl.forms.ranks.rank_program import Forwarded, RankProgram, RankRecord, serve
from gradctl.forms.ranks.sharing import shares_of
from gradctl.forms.ranks.wrapping import ensure_wrappable
from gradctl.subject.instance import Instance, Leaf
from gradctl.subject.signature import module_of
from gradctl.subject.torch_private import reset_dynamo  # noqa: F401  # Dynamo: DDP and DTensor import it in each rank

SECONDS = 300.0


class RanksRun:
    """The ranks of one run, as a context manager, which ends them.

    Args:
        kind: ``ddp``, ``fsdp``, ``tp`` or ``ranks``.
        world: the number of ranks.
        instance: the private copy with the inputs of one process; each rank inherits it as it is now.
        promotes: whether operators run in float64.
        has_means: whether random numbers are replaced by their means.
        context: entered around the run in one process that shows the shapes of the outputs.
        seconds: the time limit of each answer.
        alter: changes what each rank does, to test a cause.

    Attributes:
        shares: which rank has which share of the inputs.
        records: of each rank, by call.
        requiring: the outputs that require a gradient.

    Raises:
        CannotCapture: the model cannot be arranged in this way, or a rank fails before it runs.
        RankFailed: the ranks wait for each other before they run.
    """

    def __init__(
        self,
        kind: str,
        world: int,
        instance: Instance,
        *,
        promotes: bool,
        has_means: bool = False,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        seconds: float = SECONDS,
        alter: Callable[[RankProgram], None] | None = None,
    ) -> None:
        self.instance, self.records = instance, list[list[RankRecord]]()
        self.requiring: frozenset[str] = frozenset()
        self.buffers: dict[str, list[Tensor | None]] = {}
        ensure_runnable(kind, instance)
        self.shares, shard = shares_of(kind, world, instance.subject)
        self._shapes, called = shapes_and_called(instance, context)
        self._parts: dict[str, list[Tensor | None]] = {}
        self._whole: dict[str, Tensor] = {}
        make = partial(
            RankProgram,
            kind=kind,
            instance=instance,
            shard=shard,
            called=called,
            promotes=promotes,
            has_means=has_means,
            alter=alter,
        )
        try:
            self._processes = RankProcesses(world, serve(make), seconds)
        except RankFailed as failure:
            if failure.kind in ("hung", "late"):
                raise
            raise CannotCapture(f"{failure.reason.rstrip('.')}.", failure.details) from failure
        except OSError as error:
            raise CannotCapture(f"the processes of the ranks cannot be started: {error.strerror or error}.") from error

    def __enter__(self) -> RanksRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        self._processes.close()

    def forward(self) -> dict[str, Tensor]:
        """Return the outputs of the whole batch by name; a loss is that of the whole batch, too.

        Raises:
            RankFailed: a rank raises, dies or waits.
            CannotCapture: the outputs of the ranks do not make those of one process.
        """
        answers: list[Forwarded] = self._processes.ask([None] * self.shares.world)
        names = list(dict.fromkeys(name for each in answers for name in each.outputs))
        self.requiring = frozenset(name for each in answers for name in each.requiring)
        self._see_buffers([each.buffers for each in answers])
        self._parts, self._whole = {}, {}
        with torch.enable_grad():
            for name in names:
                parts = [each.outputs.get(name) for each in answers]
                self._parts[name] = [_leaf(each) for each in parts]
                shape = self._shapes.get(name)
                shape = shape if shape is not None else next(each.shape for each in parts if each is not None)
                whole = self.shares.whole(name, self._parts[name], shape, is_output=True)
                assert whole is not None
                self._whole[name] = whole
        return {name: each.detach() for name, each in self._whole.items()}

    def backward(self, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Return the gradient of each leaf of the instance by name, of these cotangents of the whole outputs.

        A parameter that is frozen in one process is among them if a rank has a gradient of it.

        Raises:
            RankFailed, CannotCapture: as ``forward``, or the ranks have parameters under other names.
        """
        requests: list[dict[str, Tensor]] = [{} for _ in range(self.shares.world)]
        sharing: set[int] = set()
        for name, cotangent in cotangents.items():
            parts = self._parts[name]
            ranks = [rank for rank, part in enumerate(parts) if part is not None and part.requires_grad]
            if not ranks or not self._whole[name].requires_grad:
                continue
            asked = [each for rank in ranks if (each := parts[rank]) is not None]
            found = torch.autograd.grad(self._whole[name], asked, cotangent, allow_unused=True)
            own = {rank: each for rank, each in zip(ranks, found, strict=True) if each is not None}
            factor = 1.0 if self.shares.is_sum else float(len(own))
            sharing |= own.keys()
            for rank, part in zip(ranks, asked, strict=True):
                mate = rank if rank in own else next((each for each in self.shares.mates(rank) if each in own), None)
                requests[rank][name] = torch.zeros_like(part) if mate is None else own[mate] * factor
        self.records.append(self._processes.ask(requests))
        self._see_buffers([each.buffers for each in self.records[-1]])
        self._ensure_counterparts()
        gradients = {leaf.name: self._gradient(leaf, sorted(sharing)) for leaf in self.instance.leaves}
        names = {name for leaf in self.instance.leaves for name in _qualified(leaf)}
        frozen = named_tensors(module_of(self.instance.model))[0].keys() - names
        for record in self.records[-1]:
            of_frozen = {parameter_name(name): record.gradients.get(name) for name in frozen}
            gradients.update({name: each for name, each in of_frozen.items() if each is not None})
        return gradients

    def copies(self, leaf: Leaf) -> dict[tuple[int, str], Tensor]:
        """Return the whole gradients of a leaf in the last call, by rank and qualified name: they are to be equal."""
        found = {}
        for name in _qualified(leaf):
            for record in self.records[-1]:
                each = record.whole_gradients.get(name)
                each = record.gradients.get(name) if each is None else each
                each = record.input_gradients.get(leaf.name) if each is None and _is_held(leaf) else each
                if each is not None and each.shape == leaf.tensor.shape:
                    found[record.rank, name] = each
        return found

    def _gradient(self, leaf: Leaf, sharing: Sequence[int]) -> Tensor | None:
        """Return the gradient of one leaf; ``sharing`` are the ranks whose outputs make the whole ones."""
        records = self.records[-1]
        if not leaf.is_registered:
            parts = [record.input_gradients.get(leaf.name) for record in records]
            if not leaf.name.startswith("input:"):
                return next((each for each in parts if each is not None), None)
            # Of a pipeline, the last stage returns the outputs, and the first has the gradients of the inputs.
            held = [
                next((parts[rank] for rank in group if parts[rank] is not None), None) for group in self.shares.groups
            ]
            present = [each for rank in sharing if (each := parts[rank]) is not None] or [
                each for each in held if each is not None
            ]
            factor = 1.0 if self.shares.is_sum else float(len(sharing))
            return torch.stack(present).sum(0) / factor if present else None
        for name in _qualified(leaf):
            if len({name in record.placements for record in records}) > 1:
                return None  # a part of the ranks has a share of the gradient, and the others none
            wholes = [record.whole_gradients.get(name, record.gradients.get(name)) for record in records]
            whole = self.shares.whole(parameter_name(name), wholes, leaf.tensor.shape)
            if whole is not None:
                return whole
        return None

    def _ensure_counterparts(self) -> None:
        """Raise if parameters of the model have no counterpart on any rank, and the ranks have unknown ones."""
        held = dict.fromkeys(name for record in self.records[-1] for name in record.gradients)
        leaves = [leaf for leaf in self.instance.leaves if leaf.is_registered]
        missing = [leaf.name for leaf in leaves if held.keys().isdisjoint(_qualified(leaf))]
        unknown = held.keys() - named_tensors(module_of(self.instance.model))[0].keys()
        if missing and unknown:
            raise CannotCapture(
                f"no rank has {listed(missing)}; the ranks have {listed(sorted(unknown))} instead, whose gradients "
                "cannot be compared. Keep the names of the parameters (in FSDP1: use_orig_params=True)."
            )

    def _see_buffers(self, found: Sequence[Mapping[str, Tensor]]) -> None:
        names = dict.fromkeys(name for each in found for name in each)
        self.buffers = {buffer_name(name): [each.get(name) for each in found] for name in names}


def ensure_runnable(kind: str, instance: Instance) -> None:
    """Raise if the machine cannot start ranks, or the model cannot be arranged in this way.

    Raises:
        CannotCapture: with the reason.
    """
    if not hasattr(os, "memfd_create") or not torch.distributed.is_available():
        raise CannotCapture(
            "ranks are forked and joined by gloo, which this system or this torch cannot do; use Linux."
        )
    devices = {leaf.tensor.device.type for leaf in instance.leaves} - {"cpu"}
    if devices:
        raise CannotCapture(f"ranks are compared on the CPU, and the model is on {devices.pop()!r}; omit --device.")
    ensure_wrappable(kind, instance.subject, instance.model)


def _qualified(leaf: Leaf) -> list[str]:
    return [name.removeprefix("param:") for name in (leaf.name, *leaf.tied)]


def _is_held(leaf: Leaf) -> bool:
    """Return whether a leaf is a tensor that the model holds without registering it."""
    return not leaf.is_registered and not leaf.name.startswith("input:")


def _leaf(part: Tensor | None) -> Tensor | None:
    is_float = part is not None and (part.is_floating_point() or part.is_complex())
    return part.detach().requires_grad_() if part is not None and is_float else part


def shapes_and_called(
    instance: Instance, context: Callable[[], AbstractContextManager[Any]]
) -> tuple[dict[str, torch.Size], frozenset[str]]:
    """Return the shapes of the outputs in one process, and the names of the modules that the model calls."""
    module = module_of(instance.model)
    names = {id(each): name for name, each in module.named_modules()} if module is not None else {}
    called: set[str] = set()

    def see(each: nn.Module, _: Any) -> None:
        called.add(names.get(id(each), ""))

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(see).remove)
        stack.enter_context(context())
        stack.enter_context(torch.enable_grad())  # a model may differentiate inside
        outputs = instance.call(instance.model, *instance.inputs())
    instance.restore()
    return {name: each.shape for name, each in outputs}, frozenset(called)
