"""The experiments on ranks that differ from one process, each with the cause that it tests.

What is tried is chosen by what modules, Functions and collectives of the ranks were seen to do; whether it is the cause
is decided by a run of the ranks with one thing changed, which must agree with one process then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradctl.comparison.program import run_calls, run_copy
from gradctl.comparison.ranks.rank_comparison import RankComparison
from gradctl.diagnosis.causes import Cause
from gradctl.diagnosis.ranks.alterations import (
    Alter,
    both,
    change_gradient,
    differentiate_collectives,
    gather_inputs,
    named_modules,
    observe_modules,
    sum_output,
    summed,
    watch_functions,
    weigh_loss,
)
from gradctl.diagnosis.ranks.rank_values import alike, relation
from gradctl.forms import eager
from gradctl.forms.form import Outcome
from gradctl.forms.ranks.rank_program import RankRecord
from gradctl.forms.ranks.sharing import as_call, given_inputs
from gradctl.subject.frames import is_users
from gradctl.subject.instance import Instance
from gradctl.subject.state import State
from gradctl.tracing.tracer import SourceLine

# Of several places of one kind, the first are tried; each is a run of the ranks.
_MOST_PLACES = 4


@dataclass(frozen=True, slots=True)
class RankExperiment:
    """What the ranks do otherwise, and the cause if they agree with one process then."""

    alter: Alter
    cause: Cause


@dataclass(slots=True, eq=False)
class Observed:
    """What ranks and one process were seen to do on the example.

    Attributes:
        comparison: of the ranks.
        records: of each rank.
        whole: values of modules in one process, as the ranks have them in ``RankRecord.observed``.
        model: in one process, promoted.
    """

    comparison: RankComparison
    records: list[RankRecord]
    whole: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    def __post_init__(self) -> None:
        subject = self.comparison.example.instance.subject
        mode = self.comparison.reference.input_mode
        instance = Instance(subject, promoted=True, input_mode=mode, keep_hooks=True)

        def call(*args: Any, **kwargs: Any) -> Any:
            observe_modules(instance.model, lambda: self.whole)  # now: the copy is put back before the call
            return instance.model(*args, **kwargs)

        captured = replace(eager.capture(instance), call=call)
        run_calls(captured, instance, State([]), calls=1, context=self.comparison.context)
        self.model = instance.model

    @property
    def form(self) -> str:
        """The name of the form."""
        return self.comparison.program.name

    @property
    def has_mates(self) -> bool:
        """Whether several ranks have the same inputs, as in tensor parallelism."""
        return len(self.comparison.shares.groups) < self.comparison.shares.world

    def parts(self, kind: str, module: str) -> list[Tensor | None]:
        """Return the ``outputs``, ``inputs`` or ``cotangents`` that the ranks have at a module."""
        return [record.observed.get(kind, {}).get(module) for record in self.records]

    def modules(self, kind: str) -> list[str]:
        """Return the modules whose values are known in one process, in the order in which they return."""
        return [name for name in self.whole.get("outputs", {}) if name in self.whole.get(kind, {})]

    def relation(self, kind: str, module: str, factor: float = 1.0) -> tuple[str, int]:
        """Return how the values of the ranks at a module make that of one process."""
        return relation(self.whole[kind][module], self.parts(kind, module), factor)

    def consumers(self, module: str) -> list[str]:
        """Return the modules that take what a module returns."""
        output, inputs = self.whole["outputs"][module], self.whole.get("inputs", {})
        return [name for name, each in inputs.items() if name != module and alike(each, output) and name]

    def place(self, module: str) -> SourceLine | None:
        """Return file and line of the forward of a module; of ``parallelize``, if that is not the user's code."""
        owner = dict(named_modules(self.model)).get(module)
        own = defined_at(type(owner).forward) if owner is not None else None
        return own or defined_at(self.comparison.reference.subject.beside.get("parallelize"))


def defined_at(function: Any) -> SourceLine | None:
    """Return where a function of the user's is defined."""
    try:
        file, (_, line) = inspect.getsourcefile(function), inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    return (file, line) if file is not None and is_users(file) else None


def rank_experiments(seen: Observed) -> Iterator[RankExperiment]:
    """Yield the experiments, each made on demand, the most specific first."""
    yield from _cut_collectives(seen)
    yield from _functions(seen)
    yield from _partial_outputs(seen)
    yield from _partial_gradients(seen)
    yield from _scaled_gradients(seen)
    yield from _weighted_losses(seen)
    yield from _shares_alone(seen)


def _cut_collectives(seen: Observed) -> Iterator[RankExperiment]:
    """Yield collectives that were called with a tensor that requires a gradient, and have no backward."""
    cuts: dict[str, SourceLine | None] = {}
    for record in seen.records:
        cuts = {**record.observed.get("cuts", {}), **cuts}
    for sums in (True, False) if cuts else ():
        words = "the sum of the gradients over the ranks" if sums else "the gradient of this rank's part"
        yield RankExperiment(
            differentiate_collectives(sums),
            Cause(
                "GC226",
                f"autograd does not see torch.distributed.{' and '.join(cuts)}, and with a backward that returns "
                f"{words} the ranks agree with one process",
                "use torch.distributed._functional_collectives.all_reduce, or an autograd.Function with that backward.",
                next(iter(cuts.values())),
            ),
        )


def _functions(seen: Observed) -> Iterator[RankExperiment]:
    """Yield the user's Functions whose backward may not be the derivative of their forward over the ranks."""
    called = {each.name for record in seen.records for each in record.collectives}
    if not called or called & {"send", "recv"}:  # without its partner, a rank would wait for ever
        return
    functions = {name: at for record in seen.records for name, at in record.observed.get("functions", {}).items()}
    for name, place in list(functions.items())[:_MOST_PLACES]:
        for sums in (True, False):
            words = "sum the gradients over the ranks" if sums else "keep the gradient of each rank's part"
            yield RankExperiment(
                both(differentiate_collectives(sums), watch_functions(name)),
                Cause(
                    "GC226",
                    f"the backward of {name.rpartition('.')[2]} is not that of its forward over the ranks; with the "
                    f"derivative of its forward, in which collectives {words}, the ranks agree with one process",
                    "sum gradients over the ranks if each rank has a loss of its own, or parts of the result; not if "
                    "all ranks compute the same loss from it.",
                    place,
                ),
            )


def _partial_outputs(seen: Observed) -> Iterator[RankExperiment]:
    """Yield modules that return, on each rank, a part of the sum that they return in one process."""
    biases = {name: _bias(seen, name) for name in seen.modules("outputs") if name}
    partial = [name for name, bias in biases.items() if _is_sum(seen, name, bias) or _is_sum(seen, name, None)]
    for name in partial[:_MOST_PLACES]:
        has_bias = _is_sum(seen, name, biases[name]) and biases[name] is not None
        yield RankExperiment(
            sum_output(name, has_bias=has_bias),
            Cause(
                "GC225",
                f"what {name} returns on each rank is one part of a sum, which is not summed over the ranks",
                "sum it over the ranks, with a backward that is the identity, before a bias is added.",
                seen.place(name),
                name,
            ),
        )


def _bias(seen: Observed, module: str) -> Tensor | None:
    """Return the bias of a module that adds one to its output."""
    bias = getattr(dict(named_modules(seen.model)).get(module), "bias", None)
    return bias if isinstance(bias, Tensor) and bias.shape == seen.whole["outputs"][module].shape[-1:] else None


def _is_sum(seen: Observed, module: str, bias: Tensor | None) -> bool:
    """Return whether the outputs of the ranks add up to that of one process, if each rank has added the bias."""
    whole, parts = seen.whole["outputs"][module], seen.parts("outputs", module)
    if any(each is None or each.shape != whole.shape for each in parts):
        return False
    own = 0.0 if bias is None else bias.detach()
    return relation(whole - own, [each - own for each in parts if each is not None])[0] == "sum"


def _partial_gradients(seen: Observed) -> Iterator[RankExperiment]:
    """Yield modules at whose output each rank has a part of the gradient, from the last that runs."""
    partial = [each for each in seen.modules("cotangents") if each and seen.relation("cotangents", each)[0] == "sum"]
    for name in partial[::-1][:_MOST_PLACES] if seen.has_mates else ():
        users = seen.consumers(name)
        where = f" ({users[0]} takes it)" if users else ""
        yield RankExperiment(
            change_gradient(name, summed),
            Cause(
                "GC225",
                f"the gradient of what {name} returns{where} is one part of a sum on each rank, which is not summed "
                "over the ranks",
                "let the layer with the sharded weight sum the gradient of its input over the ranks (the identity in "
                "forward), or convert with to_local(grad_placements=[Partial()]).",
                seen.place(users[0]) if users else seen.place(name),
                name,
            ),
        )


def _scaled_gradients(seen: Observed) -> Iterator[RankExperiment]:
    """Yield modules at whose output the gradient is multiplied or divided by the number of ranks, from the last."""
    shares, world = seen.comparison.shares, seen.comparison.shares.world
    own = 1.0 if shares.is_sum else float(len(shares.groups))
    for factor in (float(world), 1.0 / world):
        wrong = [
            each
            for each in seen.modules("cotangents")
            if each and seen.relation("cotangents", each, own * factor)[0] in ("same", "shard")
        ]
        for name in wrong[::-1][:1]:
            users = seen.consumers(name)
            said = "multiplied" if factor > 1 else "divided"
            yield RankExperiment(
                change_gradient(name, lambda gradient, factor=factor: gradient / factor),  # type: ignore[misc]
                Cause(
                    "GC221",
                    f"the gradient of what {name} returns is {said} by the number of ranks in the backward of "
                    f"{users[0] if users else 'what follows'}",
                    "sum gradients over the ranks once: a sum whose result all ranks use alike has the identity as its "
                    "backward.",
                    seen.place(users[0]) if users else seen.place(name),
                    name,
                ),
            )


def _weighted_losses(seen: Observed) -> Iterator[RankExperiment]:
    """Yield the weights of the shares with which the mean of their losses is the loss of the whole batch."""
    comparison = seen.comparison
    expected, groups = comparison.expected[seen.comparison.example.name][0].outcome, comparison.shares.groups
    if len(groups) < 2 or any(each.dim() for each in expected.outputs.values()):
        return
    weights = _fit(expected, [_on_share(seen, group[0]) for group in groups])
    if weights is None:
        return
    of_rank = {rank: weight * len(groups) for group, weight in zip(groups, weights, strict=True) for rank in group}
    shown = ", ".join(f"{each:.3g}" for each in weights)
    yield RankExperiment(
        weigh_loss([of_rank[rank] for rank in range(comparison.shares.world)]),
        Cause(
            "GC227",
            "each rank takes the mean over its own items (tokens, for example), and these means count alike: weighted "
            f"by {shown} for the shares of the ranks, they agree with one process",
            "divide the sum of each rank's losses by the number of items on all ranks (all_reduce of the count), times "
            "the number of ranks if gradients are averaged.",
            defined_at(type(seen.model).forward) if isinstance(seen.model, nn.Module) else None,
        ),
    )


def _on_share(seen: Observed, rank: int) -> Outcome:
    """Return what one process computes on the share of one rank."""
    comparison, subject = seen.comparison, seen.comparison.example.instance.subject
    given = comparison.shard(given_inputs(subject.args, subject.kwargs), rank, comparison.shares.world)
    args, kwargs = as_call(given, subject.args, subject.kwargs)
    _, found = run_copy(
        seen.comparison.example.name,
        replace(subject, args=args, kwargs=kwargs),
        comparison.reference.subject,
        promoted=True,
        input_mode=comparison.reference.input_mode,
        calls=1,
        context=comparison.context,
    )
    return found[0]


def _fit(whole: Outcome, shares: list[Outcome]) -> list[float] | None:
    """Return the weights by which gradients of the shares make that of the whole; None unless unequal weights do."""
    names = [name for name, each in whole.gradients.items() if name.startswith("param:") and each is not None]
    if not names or any(share.gradients.get(name) is None for share in shares for name in names):
        return None

    def vector(outcome: Outcome) -> Tensor:
        return torch.cat([each.flatten().double() for name in names if (each := outcome.gradients[name]) is not None])

    columns, expected = torch.stack([vector(each) for each in shares], 1), vector(whole)
    weights = torch.linalg.lstsq(columns, expected.unsqueeze(1)).solution.squeeze(1)
    is_mean = bool((weights > 0).all()) and abs(float(weights.sum()) - 1) < 1e-6
    is_equal = bool((weights - 1 / len(shares)).abs().max() < 1e-6)
    return weights.tolist() if is_mean and not is_equal and alike(columns @ weights, expected) else None


def _shares_alone(seen: Observed) -> Iterator[RankExperiment]:
    """Yield modules that take a shard of their input in one process, and return no shard of their output there."""
    found = []
    for name in seen.modules("inputs"):
        how, axis = seen.relation("inputs", name)
        if name and how == "shard" and seen.relation("outputs", name)[0] == "other":
            found.append((name, axis))
    for name, axis in found[:_MOST_PLACES]:
        yield RankExperiment(
            gather_inputs(name, axis),
            Cause(
                "GC228",
                f"{name} computes on each rank's part of axis {axis} alone, and its result depends on all of it; with "
                "its input gathered over the ranks, they agree with one process",
                "gather keys and values over the ranks (ring attention), use SyncBatchNorm in place of BatchNorm, "
                "or do not shard this axis.",
                seen.place(name),
                name,
            ),
        )
