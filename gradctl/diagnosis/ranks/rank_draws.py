"""Random numbers on many ranks: the same ones where ranks have other samples, others where they have the same: GC626.

The comparison of results replaces random numbers by their means. Here ranks and one process run with their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradctl.comparison.program import run_copy
from gradctl.comparison.ranks.rank_comparison import RankComparison
from gradctl.core.errors import listed
from gradctl.core.findings import Finding
from gradctl.diagnosis.ranks.alterations import named_modules
from gradctl.forms.draws import Draw, RecordedDraws
from gradctl.forms.form import CannotCapture
from gradctl.forms.ranks.processes import RankFailed
from gradctl.forms.ranks.rank_program import RankProgram, RankRecord
from gradctl.gradients.gradient_findings import location
from gradctl.subject.frames import user_location
from gradctl.subject.torch_private import patched
from gradctl.tracing.tracer import SourceLine


def draw_findings(comparison: RankComparison) -> Iterator[Finding]:
    """Yield what is wrong with the random numbers of the ranks, if the model draws any."""
    if not comparison.has_means:
        return
    try:
        whole, records = _draws_of_whole(comparison), _records(comparison)
    except (CannotCapture, RankFailed):
        return
    form, groups = comparison.program.name, comparison.shares.groups
    seeds: list[SourceLine] = [place for record in records for place in record.observed.get("seeds", ())]
    place = location(seeds[0] if seeds else None)
    for group in groups:
        for rank in group[1:]:
            draw = _other(whole, records[group[0]].draws, records[rank].draws)
            if draw is not None:
                yield Finding(
                    code="GC626",
                    severity="error",
                    message=f"in {form} rank {rank} has the inputs of rank {group[0]}, and draws other random numbers "
                    f"where one process draws {draw[0]} {list(draw[1])}: the ranks mask one activation differently.",
                    hint="seed these ranks alike for what each of them has whole, and differently for what is sharded.",
                    location=place,
                    allow=f"GC626:{form}",
                )
                return
    silent = [record.rank for record in records if whole and not record.draws and record.observed.get("is_eval")]
    # Ranks with the same inputs may each have a part of the model.
    if silent and (len(silent) == len(records) or len(groups) > 1):
        yield Finding(
            code="GC626",
            severity="error",
            message=f"in {form} rank {silent[0]} draws no random numbers, and has modules in evaluation mode that are "
            f"in training mode in one process, which draws {whole[0][0]} {list(whole[0][1])}.",
            hint="leave the mode of the model as it is in parallelize.",
            allow=f"GC626:{form}",
        )
        return
    for record in records:
        if (draw := _of_another_distribution(whole, record.draws)) is not None:
            expected = dict.fromkeys(_numbers(each) for each in whole if each[0] == draw[0])
            yield Finding(
                code="GC626",
                severity="error",
                message=f"in {form} rank {record.rank} draws {draw[0]} with {_numbers(draw)}, where one process draws "
                f"it with {listed(list(expected))}.",
                hint="leave the probabilities of dropout as they are in parallelize.",
                allow=f"GC626:{form}",
            )
            return
    firsts = [records[group[0]].draws for group in groups]
    # Without a seed of the user's, the ranks have ours.
    if seeds and len(firsts) > 1 and firsts[0] and all(each == firsts[0] for each in firsts[1:]):
        yield Finding(
            code="GC626",
            severity="warning",
            message=f"in {form} all ranks draw the same random numbers for their different samples (the same dropout "
            "masks): the gradient averages over fewer masks than in one process.",
            hint="add the rank to the seed: torch.manual_seed(seed + rank).",
            location=place,
            allow=f"GC626:{form}",
        )


def _other(whole: Sequence[Draw], own: Sequence[Draw], other: Sequence[Draw]) -> Draw | None:
    """Return the first draw of one process that two ranks make with other values; None without one."""
    if not len(whole) == len(own) == len(other):
        return None
    for expected, left, right in zip(whole, own, other, strict=True):
        if expected[:2] == left[:2] == right[:2] and left != right:
            return expected
    return None


def _of_another_distribution(whole: Sequence[Draw], own: Sequence[Draw]) -> Draw | None:
    """Return the first draw of a rank by an operator that one process calls with other numbers only."""
    known = {(name, numbers) for name, *_, numbers in whole}
    names = {name for name, _ in known}
    return next((each for each in own if each[0] in names and (each[0], each[3]) not in known), None)


def _numbers(draw: Draw) -> str:
    return ", ".join(f"{each:g}" for each in draw[3]) or "no number"


def _draws_of_whole(comparison: RankComparison) -> list[Draw]:
    plain, recorded = replace(comparison, has_means=False), RecordedDraws()
    trial = comparison.example

    def context() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(plain.context())
        stack.enter_context(recorded)
        return stack

    mode = comparison.reference.input_mode
    run_copy(
        trial.name,
        trial.instance.subject,
        plain.reference.subject,
        promoted=True,
        input_mode=mode,
        calls=1,
        context=context,
    )
    return recorded.draws


def _records(comparison: RankComparison) -> list[RankRecord]:
    """Return what the ranks draw, and the lines of the user's that seed torch's generator there."""
    seed, seeds = torch.manual_seed, list[SourceLine]()

    def seeding(number: Any) -> Any:
        place = user_location()
        if place is not None:
            seeds.append(place)
        return seed(number)

    def alter(program: RankProgram) -> None:
        modes = {name: each.training for name, each in named_modules(program.instance.subject.module)}

        def observe(model: nn.Module, *_: Any) -> None:
            is_eval = any(modes.get(name) and not each.training for name, each in named_modules(model))
            program.record.observed |= {"seeds": list(seeds), "is_eval": is_eval}

        if isinstance(program.model, nn.Module):
            program.model.register_forward_hook(observe)

    with patched(torch, "manual_seed", seeding):  # the ranks are forked with it
        return comparison.altered(alter, has_means=False).records
