"""What runs in each rank: the model as it is arranged there, forward and backward on the share of this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gradctl.forms.draws import Draw, MeansOfDraws, RecordedDraws
from gradctl.forms.ranks.collectives import Collective, CollectiveLog
from gradctl.forms.ranks.processes import Rank
from gradctl.forms.ranks.sharing import Shard, as_call, given_inputs
from gradctl.forms.ranks.user_names import UserNames
from gradctl.forms.ranks.wrapping import wrap
from gradctl.forms.silence import silenced
from gradctl.subject.instance import Instance, native_dtype
from gradctl.subject.seeding import seed_generators
from gradctl.tracing.promotion import Promotion, default_dtype


@dataclass(slots=True, eq=False)
class RankRecord:
    """What one rank had and computed in one call; tensors are those of this rank, before they are gathered.

    Attributes:
        rank: its number.
        outputs: of the model, or the loss of this rank's share; detached.
        cotangents: of the outputs, as they were back-propagated here.
        gradients: local, by the qualified name in the user's model; None if a parameter has none.
        shapes: of the local parameters, by the same names.
        whole_gradients: of DTensors, the full tensors.
        placements: of gradients that are DTensors, ``(Shard(dim=0),)``.
        input_gradients: by the name of the leaf (``input:x``), in the shape of the whole input; of tensors that are no
            registered parameters, too.
        buffers: after the call.
        collectives: in order.
        draws: random numbers that were drawn in forward and backward.
        observed: what an alteration has noted.
    """

    rank: int
    outputs: dict[str, Tensor] = field(default_factory=dict)
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole_gradients: dict[str, Tensor] = field(default_factory=dict)
    placements: dict[str, str] = field(default_factory=dict)
    input_gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()
    draws: tuple[Draw, ...] = ()
    observed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Forwarded:
    """The outputs of one rank, before they are made whole: by name, detached, and which of them require a gradient."""

    outputs: dict[str, Tensor]
    requiring: frozenset[str]
    buffers: dict[str, Tensor]


@dataclass(slots=True, eq=False)
class RankProgram:
    """The program of one rank.

    Args:
        rank: which.
        kind: how the model is arranged.
        instance: the private copy, inherited from the parent.
        shard: returns the share of a rank.
        called: names of the modules that the model calls.
        promotes: whether operators run in float64.
        has_means: whether random numbers are replaced by their means.
        alter: called once the model is arranged: changes what this rank does, to test a cause.
    """

    rank: Rank
    kind: str
    instance: Instance
    shard: Shard
    called: frozenset[str]
    promotes: bool
    has_means: bool
    alter: Callable[[RankProgram], None] | None = None
    model: Any = field(init=False)
    record: RankRecord = field(init=False)
    _log: CollectiveLog = field(init=False)
    _draws: RecordedDraws = field(init=False)
    _outputs: dict[str, Tensor] = field(init=False)
    _names: UserNames = field(init=False)
    _generators: Tensor = field(init=False)

    def __post_init__(self) -> None:
        subject = self.instance.subject
        self._names = UserNames(self.instance)
        self.rank.note("arranges the model")
        # The user's function seeds the ranks as its training does. DDP, FSDP: each sample has its own random numbers.
        seed_generators(subject.seed + (self.rank.number if self.kind in ("ddp", "fsdp") else 0))
        mesh = init_device_mesh("cpu", (self.rank.world,))
        with self._context(), silenced():
            self.model = wrap(self.kind, subject, self.instance.model, mesh, self.called)
            if self.alter is not None:
                self.alter(self)
        self._generators = torch.get_rng_state()

    def answer(self, request: Mapping[str, Tensor] | None) -> Forwarded | RankRecord:
        """Return the outputs of a forward, if None is asked; else the record of the call, with these cotangents."""
        with self._context(), silenced():
            return self._forward() if request is None else self._backward(request)

    def _context(self) -> ExitStack:
        stack = ExitStack()
        if self.promotes:
            stack.enter_context(default_dtype(torch.float64))
            stack.enter_context(Promotion(native_dtype(self.instance.subject)))
        if self.has_means:
            stack.enter_context(MeansOfDraws())
        return stack

    def _forward(self) -> Forwarded:
        self.record = RankRecord(self.rank.number)
        self._log, self._draws = CollectiveLog(self.model, self.rank.note), RecordedDraws()
        self._clear()
        args, kwargs = self.instance.inputs()
        given = self.shard(given_inputs(args, kwargs), self.rank.number, self.rank.world)
        args, kwargs = as_call(given, args, kwargs)
        torch.set_rng_state(self._generators)
        self.rank.note("computes the forward")
        with self._log, self._draws, self._log.watch_modules(), torch.enable_grad():
            found = dict(self.instance.call_as_seeded(self.model, args, kwargs))
            self._outputs = {
                name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()
            }
        self.record.outputs = {name: each.detach().clone() for name, each in self._outputs.items()}
        requiring = frozenset(name for name, each in self._outputs.items() if each.requires_grad)
        return Forwarded(self.record.outputs, requiring, self._buffers())

    def _backward(self, cotangents: Mapping[str, Tensor]) -> RankRecord:
        self.record.cotangents = dict(cotangents)
        self._log.phase = "backward"
        self.rank.note("computes the backward")
        asked = [name for name in cotangents if self._outputs[name].requires_grad]
        with self._log, self._draws:
            if asked:
                torch.autograd.backward([self._outputs[name] for name in asked], [cotangents[name] for name in asked])
        self.rank.note("gathers the gradients")
        self._take_gradients()
        self.record.buffers = self._buffers()
        self.record.collectives, self.record.draws = tuple(self._log.found), tuple(self._draws.draws)
        return self.record

    def _clear(self) -> None:
        for parameter in self._names.parameters(self.model).values():
            parameter.grad = None
        for leaf in self.instance.leaves:
            leaf.take_gradient()

    def _take_gradients(self) -> None:
        record, sharded, parameters = self.record, [], self._names.parameters(self.model)
        for name, parameter in parameters.items():
            gradient = parameter.grad
            record.shapes[name] = tuple(parameter.shape)
            if isinstance(gradient, DTensor):
                sharded.append(name)
                record.placements[name] = str(tuple(gradient.placements))
                record.gradients[name] = gradient.to_local().detach().clone()
            else:
                record.gradients[name] = _dense(gradient)
        # A DTensor is gathered by all ranks or none: one without a gradient would leave the others waiting.
        everywhere: list[Any] = [None] * self.rank.world
        torch.distributed.all_gather_object(everywhere, sharded)
        for name in sharded:
            if all(name in names for names in everywhere):
                gradient = parameters[name].grad
                assert isinstance(gradient, DTensor)
                record.whole_gradients[name] = gradient.full_tensor().detach()
        own = {id(each) for each in parameters.values()}
        for leaf in self.instance.leaves:
            if not leaf.is_registered and not any(id(each) in own for each in leaf.sharing):
                record.input_gradients[leaf.name] = leaf.take_gradient()

    def _buffers(self) -> dict[str, Tensor]:
        return {
            name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
            for name, each in self._names.buffers(self.model).items()
        }


def serve(make: Callable[[Rank], RankProgram]) -> Callable[[Rank], Callable[[Any], Any]]:
    """Return what ``RankProcesses`` runs: each rank makes its program, and answers with it."""
    return lambda rank: make(rank).answer


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach().clone()
