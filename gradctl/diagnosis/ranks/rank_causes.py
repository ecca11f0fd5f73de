"""Causes of what differs on many ranks: GC221 to GC228, each established by an experiment before it is named.

The ranks run again with one thing changed (``rank_experiments``); the cause is named if they agree with one process
then. Gradients that were not reduced, or not divided, are reduced and divided here: what is linear needs no other run.
Where no experiment agrees, the verdict stands without a cause.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from gradctl.comparison.difference import Key
from gradctl.comparison.ranks.rank_comparison import RankComparison
from gradctl.core.errors import listed
from gradctl.core.findings import Finding
from gradctl.diagnosis.causes import Cause, key_of, state_causes
from gradctl.diagnosis.ranks.alterations import Alter, both, differentiate_collectives, watch_functions, watch_modules
from gradctl.diagnosis.ranks.rank_experiments import Observed, defined_at, rank_experiments
from gradctl.forms.form import CannotCapture
from gradctl.forms.ranks.processes import RankFailed
from gradctl.forms.ranks.rank_program import RankRecord
from gradctl.numerics.agreement import norm_of_difference

# Experiments begin within this time; of small models it is a second for each.
_SECONDS = 60.0
# Causes that no other explains better.
_DECIDED = ("GC223", "GC224")


def explain_ranks(findings: Sequence[Finding], comparison: RankComparison) -> list[Finding]:
    """Return the findings on a model on many ranks, each with its cause if an experiment confirms one."""
    open_keys = {key_of(each) for each in findings if each.severity == "error"}
    if not open_keys or not comparison.expected:
        return list(findings)
    try:
        watched = _altered(comparison, both(watch_modules, watch_functions(), differentiate_collectives(None)))
    except RankFailed:
        return list(findings)
    if watched is None or not _wrong(watched):
        return list(findings)
    causes = _by_gradients(watched)
    is_decided = len(causes) == len(_wrong(watched)) and all(each.code in _DECIDED for each in causes.values())
    found = {} if is_decided else _by_experiments(Observed(comparison, watched.records), _wrong(watched))
    # One that explains all is nearer to the cause than what became of each gradient.
    causes = {**causes, **found} if len(found) == len(_wrong(watched)) else {**found, **causes}
    if found and len(set(causes.values())) == 1:
        causes = dict.fromkeys(open_keys, next(iter(causes.values())))
    return state_causes(findings, causes)


def _by_experiments(seen: Observed, before: set[Key]) -> dict[Key, Cause]:
    """Return the cause of each tensor that agrees in an experiment in which no other differs."""
    start, found = time.monotonic(), dict[Key, Cause]()
    for experiment in rank_experiments(seen):
        if time.monotonic() - start > _SECONDS:
            break
        try:
            other = _altered(seen.comparison, experiment.alter)
        except RankFailed:  # the ranks wait for each other: so would those of the next experiments
            break
        after = before if other is None else _wrong(other)
        if not after:
            return dict.fromkeys(before, experiment.cause)
        if after < before:
            found = {**dict.fromkeys(before - after, experiment.cause), **found}
    return found


def _altered(comparison: RankComparison, alter: Alter) -> RankComparison | None:
    """Return the comparison of altered ranks; None if they do not run."""
    try:
        return comparison.altered(alter)
    except CannotCapture:
        return None
    except RankFailed as failure:
        if failure.kind in ("hung", "late"):  # ten seconds each
            raise
        return None


def _wrong(comparison: RankComparison) -> set[Key]:
    return {key for key, each in comparison.worst.items() if each.differs} | comparison.disagreements.keys()


# ------------------------------------------------------------------ gradients, reduced here


def _by_gradients(comparison: RankComparison) -> dict[Key, Cause]:
    """Return the causes that the gradients of the ranks show, by what makes them that of one process."""
    found = {}
    for key in _wrong(comparison):
        difference = comparison.worst[key]
        if key[0] != "gradient" or difference.reference is None or difference.candidate is None:
            continue
        if difference.reference.shape != difference.candidate.shape:
            continue
        expected = comparison.expected[difference.trial.name][0]
        copies = comparison.program.copies[0].get(key[1]) or {(0, ""): difference.candidate}
        tolerance = expected.tolerance(key, difference.reference)
        cause = _of_copies(comparison, copies, difference.reference, tolerance)
        if cause is not None:
            found[key] = cause
    return found


def _of_copies(
    comparison: RankComparison,
    copies: dict[tuple[int, str], Tensor],
    reference: Tensor,
    tolerance: float,
) -> Cause | None:
    """Return the cause that the copies of one gradient show: scaled, on one rank only, of one stage, or not reduced."""
    world, form, records = comparison.shares.world, comparison.program.name, comparison.records
    place = defined_at(comparison.reference.subject.beside.get("parallelize"))

    def agrees(tensor: Tensor, factor: float = 1.0) -> bool:
        return norm_of_difference(tensor * factor, reference) <= tolerance * max(factor, 1.0)

    values = list(copies.values())
    # If the outputs of the model differ, its gradients follow: a factor of its own may be the number of ranks.
    is_of_outputs = comparison.reference.subject.loss is None and any(
        kind == "output" for kind, _ in _wrong(comparison)
    )
    for power in () if is_of_outputs else (1, -1, 2, -2):
        if all(agrees(each, float(world) ** power) for each in values):
            return _scaled(form, world, power, place, records)
    ranks = [rank for (rank, _), each in copies.items() if agrees(each)]
    others = [rank for rank, _ in copies if rank not in ranks]
    if ranks and others:
        return Cause(
            "GC223",
            f"only {_ranks(ranks)} of {form} has the gradient of the whole batch, and {_ranks(others)} has another",
            "use all_reduce, which leaves the sum on all ranks, and not reduce; or broadcast it.",
            place,
        )
    total = torch.stack(values).sum(0)
    names = sorted({name for _, name in copies})
    if len(names) > 1 and agrees(total):
        held = " and ".join(f"{name} on rank {rank}" for rank, name in copies)
        return Cause(
            "GC224",
            f"{held} are copies of one tied weight, and each has the gradient of its own uses: their sum is right",
            "sum the gradients of the copies over the ranks that have them, before the step.",
            place,
        )
    for factor, word in ((1.0, "sum"), (1.0 / world, "mean"), (1.0 / len(comparison.shares.groups), "sum")):
        if len(values) > 1 and agrees(total, factor):
            return Cause(
                "GC222",
                f"each rank has a part of the gradient of its own, which is not reduced: their {word} is right",
                f"reduce it over the ranks ({_collectives(records)}).",
                place,
            )
    return None


def _scaled(form: str, world: int, power: int, place: tuple[str, int] | None, records: Sequence[RankRecord]) -> Cause:
    """Return the cause of a gradient that ``world ** power`` times it makes right."""
    if power < 0:
        words = f"is {world**-power} times too large: the {world} ranks of {form} sum it, and take no mean"
        hint = "take the mean over the ranks, or let each rank divide its loss by the size of the whole batch"
    else:
        words = f"is 1/{world**power} of that in one process: it is divided by the number of ranks of {form} again"
        hint = "divide by the number of ranks once: DDP and FSDP do it already"
    return Cause("GC221", f"the gradient {words}", f"{hint} ({_collectives(records)}).", place)


def _collectives(records: Sequence[RankRecord]) -> str:
    """Return what the ranks call in backward, for a hint."""
    count = Counter(each.name for each in records[0].collectives if each.phase == "backward")
    said = listed([f"{times} x {name}" for name, times in count.items()])
    return f"in backward rank 0 calls {said}" if count else "the ranks call no collective in backward"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
