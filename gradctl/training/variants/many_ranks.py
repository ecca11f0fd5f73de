"""``ddp:N``, ``fsdp:N``, ``tp:N`` and ``ranks:N``: the step on N ranks, whose gradients and state are gathered.

Each rank has its share of each batch, and its own optimizer for what it holds: shards of parameters have shards of the
state. A function ``rank_step(model, optimizer, *inputs) -> loss`` beside the target is the step of each rank (gradient
clipping, ``no_sync``); one process makes the same step on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gradctl.core.errors import TargetError
from gradctl.core.names import buffer_name
from gradctl.forms.form import CannotCapture, Outcome
from gradctl.forms.ranks.processes import Rank, RankFailed, RankProcesses
from gradctl.forms.ranks.ranks_run import ensure_runnable, shapes_and_called
from gradctl.forms.ranks.sharing import Shard, Shares, as_call, given_inputs, shares_of
from gradctl.forms.ranks.user_names import UserNames
from gradctl.forms.ranks.wrapping import wrap
from gradctl.forms.silence import silenced
from gradctl.numerics.agreement import norm_of_difference, scale_of
from gradctl.subject.seeding import seed_generators
from gradctl.training.chosen_variants import use_own_step
from gradctl.training.step_experiments import Experiment, Experiments
from gradctl.training.trainer import LOSS, StepRecord, Trainer
from gradctl.training.variants.accumulation import statistics_modules
from gradctl.training.variants.table import CannotApply

_MOST_RANKS = 8
# Copies of one tensor on several ranks, which make the same operations, are equal to the last bit.
_ALIKE = 1e-6


def ddp(trainer: Trainer, argument: str | None) -> None:
    """Step with DistributedDataParallel."""
    _alter(trainer, "ddp", argument)


def fsdp(trainer: Trainer, argument: str | None) -> None:
    """Step with FSDP2, whose optimizer has shards of the state."""
    _alter(trainer, "fsdp", argument)


def tp(trainer: Trainer, argument: str | None) -> None:
    """Step with tensor parallelism by the plan of the target."""
    _alter(trainer, "tp", argument)


def ranks(trainer: Trainer, argument: str | None) -> None:
    """Step with the user's ``parallelize``."""
    _alter(trainer, "ranks", argument)


def plain(trainer: Trainer, argument: str | None) -> None:
    """Let one process make the user's ``rank_step``, if there is one."""
    step = trainer.recipe.subject.beside.get("rank_step")
    if step is not None:
        use_own_step(trainer, step)


def experiments(argument: str | None, entry: str) -> Experiments:
    """Yield the tests of GC440: without the number that torch adds to a norm before it divides by it, and with it."""
    for added in (0.0, 1e-6):
        agrees = yield Experiment(
            "GC440",
            lambda: (
                "each rank clips its gradients by the norm of what it holds; clipped by the norm over all ranks, "
                "the steps agree"
            ),
            "Call torch.nn.utils.clip_grad_norm_ with the DTensors of FSDP, or sum squares of shards over the ranks.",
            lambda trainer, text, added=added: _alter(trainer, entry, text, clips_with=added),  # type: ignore[misc]
        )
        if agrees:
            return


def _alter(trainer: Trainer, kind: str, argument: str | None, *, clips_with: float | None = None) -> None:
    """Let ranks make the steps.

    Args:
        trainer: the run.
        kind: how the model is arranged.
        argument: the number of ranks.
        clips_with: what is added to norms by which gradients are clipped, if that over all ranks is to replace them.

    Raises:
        CannotApply: the model cannot be arranged in this way.
        TargetError: GC145 for an invalid number of ranks.
    """
    if argument is None or not argument.isdigit() or not 2 <= int(argument) <= _MOST_RANKS:
        said = f"{kind} takes the number of ranks, 2 to {_MOST_RANKS} ({kind}:2), not {argument!r}."
        raise TargetError("GC145", said)
    try:
        ensure_runnable(kind, trainer.instance)
        shares, shard = shares_of(kind, int(argument), trainer.recipe.subject)
    except CannotCapture as refusal:
        raise CannotApply(refusal.reason.rstrip(".")) from refusal
    names = [name or "the model" for name in statistics_modules(trainer)]
    if names and len(shares.groups) > 1:
        raise CannotApply(f"{names[0]} computes statistics over the batch, of which each rank has a share; use --eval")

    def before_step(number: int) -> None:
        if number == 0:
            trainer.made_elsewhere = _steps(trainer, kind, shares, shard, clips_with=clips_with)

    trainer.before_step = before_step


def _steps(
    trainer: Trainer, kind: str, shares: Shares, shard: Shard, *, clips_with: float | None
) -> Generator[StepRecord, None, None]:
    """Yield the records of the steps that the ranks make.

    Raises:
        RuntimeError: a rank fails, or ranks have different copies of one tensor.
    """
    _, called = shapes_and_called(trainer.instance, trainer.context)
    shapes = {name: tensors[0].shape for name, tensors in trainer.parameters.items()}

    def serve(rank: Rank) -> Callable[[Any], Any]:
        run = _arranged(trainer, kind, (shares, shard), rank, called)
        if clips_with is not None:
            _clip_by_all(run, shapes, clips_with)
        steps = run.run(trainer.steps)
        return lambda _: _sent(next(steps))

    try:
        with RankProcesses(shares.world, serve) as processes:
            for _ in range(trainer.steps):
                answers: list[StepRecord] = processes.ask([None] * shares.world)
                yield _gathered(trainer, shares, shapes, answers)
    except RankFailed as failure:
        raise RuntimeError(failure.reason) from failure


def _arranged(
    trainer: Trainer, kind: str, sharing: tuple[Shares, Shard], rank: Rank, called: frozenset[str]
) -> Trainer:
    """Return the run of one rank: called in its process, whose copy of the trainer it changes."""
    subject, (shares, shard) = trainer.recipe.subject, sharing
    group = next(number for number, ranks_of in enumerate(shares.groups) if rank.number in ranks_of)
    trainer.made_elsewhere, trainer.before_step = None, lambda number: None
    seed_generators(subject.seed)
    mesh = init_device_mesh("cpu", (rank.world,))
    leaves = {
        leaf.name: [each.removeprefix("param:") for each in (leaf.name, *leaf.tied)] for leaf in trainer.instance.leaves
    }
    names = UserNames(trainer.instance)
    with trainer.context(), silenced():
        trainer.call = wrap(kind, subject, trainer.instance.model, mesh, called)
    own = names.parameters(trainer.call)
    for name in list(trainer.parameters):
        tensors = {id(own[each]): own[each] for each in leaves[name] if each in own}
        if tensors:
            trainer.parameters[name] = tuple(tensors.values())
        elif own:  # of another stage
            del trainer.parameters[name]
    step = subject.beside.get("rank_step")
    if step is not None:
        use_own_step(trainer, step)
    else:
        trainer.forward = lambda *args, **kwargs: _loss(trainer, kind, shares, group, *args, **kwargs)
    make = trainer.step

    def step_on_share(*args: Any, **kwargs: Any) -> Tensor | None:
        given = shard(given_inputs(args, kwargs), rank.number, rank.world)
        args, kwargs = as_call(given, args, kwargs)
        return make(*args, **kwargs)

    trainer.step = step_on_share
    return trainer


def _clip_by_all(trainer: Trainer, shapes: Mapping[str, torch.Size], added: float) -> None:
    """Let a rank scale its gradients, before its optimizer steps, as if it had clipped them by the norm over all ranks.

    The factor by which the rank has clipped is that of its gradients before the step to those after the backward.
    """
    backward, record, before = Tensor.backward, trainer.record_update, dict[str, Tensor]()

    def gradients() -> dict[str, Tensor]:
        present = {name: tensors[0].grad for name, tensors in trainer.parameters.items()}
        return {n: g.to_local() if isinstance(g, DTensor) else g for n, g in present.items() if g is not None}

    def backward_and_keep(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        before.update({name: each.detach().clone() for name, each in gradients().items()})

    def clip_and_record() -> None:
        after = gradients()
        held = sum(float(each.norm()) ** 2 for each in before.values())
        factor = sum(float((each * before[name]).sum()) for name, each in after.items() if name in before) / held
        shards = sum(float(each.norm()) ** 2 for name, each in before.items() if each.shape != shapes[name])
        total = torch.tensor(shards, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        if 0 < factor < 1:
            for each in after.values():
                each.mul_((held**0.5 + added) / ((held - shards + float(total)) ** 0.5 + added))
        record()

    Tensor.backward, trainer.record_update = backward_and_keep, clip_and_record  # type: ignore[method-assign]


def _loss(trainer: Trainer, kind: str, shares: Shares, group: int, *args: Any, **kwargs: Any) -> Tensor:
    """Return the loss of a share, such that the loss of the batch is the mean over the shares.

    Raises:
        CannotApply: the weights of the outputs of a share are not known.
    """
    outputs, count = trainer.outputs(*args, **kwargs), len(shares.groups)
    if trainer.recipe.loss_name(outputs) is not None:
        return trainer.loss_of(outputs) * (1.0 if shares.is_sum else shares.weights[group] * count)
    if count == 1:
        return trainer.loss_of(outputs)
    if kind == "ranks" and "shard_inputs" in trainer.recipe.subject.beside:
        raise CannotApply("shard_inputs divides the inputs, so that the model must return a loss, or --loss be given")
    size = next(iter(outputs.values())).shape[0]
    sizes = [round(each * size / shares.weights[group]) for each in shares.weights]
    start = sum(sizes[:group])
    return trainer.loss_of(outputs, slice(start, start + sizes[group])) * (1.0 if shares.is_sum else float(count))


def _sent(record: StepRecord) -> StepRecord:
    """Return the record of a rank with whole tensors in place of DTensors, which all ranks gather together."""
    own, outcome = record.kept(), record.outcome
    whole = Outcome(_whole(outcome.outputs), _whole(outcome.gradients), _whole(own.outcome.state))
    return StepRecord(whole, own.updates, own.loss_scale, own.draws)


def _whole(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in tensors.items()}


def _gathered(
    trainer: Trainer, shares: Shares, shapes: Mapping[str, torch.Size], answers: Sequence[StepRecord]
) -> StepRecord:
    """Return the record of a step of one process that those of the ranks make."""

    def whole(name: str, parts: list[Tensor | None]) -> Tensor | None:
        owner = name if name in shapes else f"param:{name.partition('.')[2]}"
        shape = next((each.shape for each in parts if each is not None), None)
        if shape is None or name.startswith(buffer_name("")):
            return next((each for each in parts if each is not None), None)
        shape = shapes[owner] if owner in shapes and len(shape) else shape
        copies = {rank: each for rank, each in enumerate(parts) if each is not None and each.shape == shape}
        first = next(iter(copies.values()), None)
        for rank, each in copies.items():
            if first is not None and norm_of_difference(each, first) > _ALIKE * max(scale_of(first), scale_of(each)):
                raise RuntimeError(f"rank {rank} has another {name} than rank {next(iter(copies))} after the backward")
        return shares.whole(name, parts, shape)

    def all_of(kind: str) -> dict[str, Any]:
        found = [getattr(each.outcome, kind) for each in answers]
        names = dict.fromkeys(name for each in found for name in each)
        return {name: whole(name, [each.get(name) for each in found]) for name in names}

    losses = [answers[group[0]].outcome.outputs.get(LOSS) for group in shares.groups]
    outputs = {}
    if all(each is not None for each in losses):
        is_own = "rank_step" in trainer.recipe.subject.beside
        equal = [1.0 if shares.is_sum else 1.0 / len(losses)] * len(losses)
        weights = shares.weights if is_own and not shares.is_sum else equal
        outputs[LOSS] = torch.stack(
            [w * each for w, each in zip(weights, losses, strict=True) if each is not None]
        ).sum()
    first = answers[0]
    outcome = Outcome(outputs, all_of("gradients"), all_of("state"))
    return StepRecord(outcome, first.updates, first.loss_scale, first.draws)
