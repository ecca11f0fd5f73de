"""The findings about ranks beside those of every comparison: GC620 to GC627."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from gradctl.comparison.ranks.rank_comparison import Disagreement, RankComparison
from gradctl.core.errors import listed
from gradctl.core.findings import Finding, Location, note
from gradctl.core.numbers import number
from gradctl.forms.ranks.processes import RankFailed
from gradctl.forms.ranks.rank_program import RankRecord


def rank_findings(comparison: RankComparison) -> Iterator[Finding]:
    """Yield what differs between the ranks, and notes on what they are compared with."""
    form = comparison.program.name
    for each in comparison.disagreements.values():
        yield _disagreement(form, each)
    yield from _missing_copies(form, comparison.records)
    if comparison.is_by_share:
        model = comparison.reference.subject.module
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        has_norm = any(isinstance(each, kinds) and each.training for each in (model.modules() if model else ()))
        why = "batch normalisation has the statistics of each rank's share" if has_norm else "samples affect each other"
        yield note(
            "GC623",
            f"in {form} {why}, so that the model computes another function on shares of the batch than on the whole; "
            "it is compared with one process that runs share after share. Buffers are those of rank 0.",
            "use torch.nn.SyncBatchNorm if the statistics are to be those of the whole batch." if has_norm else "",
        )
    if comparison.shares.is_uneven:
        parts = " and ".join(f"{weight:.3g}" for weight in comparison.shares.weights)
        yield note(
            "GC624",
            f"the shares of the batch are of different sizes ({parts} of it), and the loss of each rank is weighted by "
            "its size here.",
            "if training takes the mean of each rank's mean loss, samples of smaller shares count more.",
        )
    if comparison.partial_inputs:
        named = listed(comparison.partial_inputs)
        yield note(
            "GC627",
            f"in {form} each rank has a part of the gradient of {named}, which no collective sums. It is not judged: "
            "no parameter is before it.",
            "sum it over the ranks if something before the model is trained; for this check, let the example require a "
            "gradient there.",
        )
    if comparison.has_means:
        yield note(
            "GC625",
            f"random numbers are replaced by their means (dropout is the identity) in {form} and in one process: the "
            "ranks draw others for their shares.",
        )


def _missing_copies(form: str, records: Sequence[RankRecord]) -> Iterator[Finding]:
    """Yield the parameters that several ranks have whole, of which a part of them has the gradient."""
    for name in dict.fromkeys(name for record in records for name in record.gradients):
        whole = max((each.shapes.get(name, ()) for each in records), key=math.prod)
        # Parts of a flat parameter may be empty on a rank (FSDP1).
        held = [each for each in records if each.shapes.get(name) == whole and name not in each.placements]
        own = [each.rank for each in held if each.gradients[name] is not None]
        missing = [each.rank for each in held if each.gradients[name] is None]
        if own and missing and any(bool(records[rank].gradients[name].any()) for rank in own):  # type: ignore[union-attr]
            yield Finding(
                code="GC620",
                severity="warning",
                quantity="gradient",
                tensor=f"param:{name}",
                message=f"in {form} rank {own[0]} has a gradient of param:{name}, and rank {missing[0]} has none. If "
                "each rank updates its own copy, the copies drift apart.",
                hint="reduce the gradient to all ranks; or allow this if one rank updates the parameter and sends it.",
                allow=f"GC620:param:{name}",
            )


def failure_finding(form: str, failure: RankFailed) -> Finding:
    """Return the finding on a rank that did not answer: GC621 if it raises or dies, GC622 if it waits."""
    code = "GC622" if failure.kind in ("hung", "late") else "GC621"
    place = failure.place
    return Finding(
        code=code,
        # Of a rank that is not ready at its time limit, it is not known whether it waits for ever.
        severity="warning" if failure.kind == "late" else "error",
        message=f"{form}: {failure.reason}, where one process runs.",
        location=Location(file=place[0], line=place[1]) if place is not None else None,
        allow=f"{code}:{form}",
    )


def _disagreement(form: str, each: Disagreement) -> Finding:
    (one, other), tensor = each.ranks, each.key[1]
    if each.names[0] == each.names[1]:
        said = f"the gradient of {tensor} on rank {other} differs from that on rank {one}"
    else:
        first, second = each.names
        said = (
            f"{tensor} is tied, and the gradient of {second} on rank {other} differs from that of {first} on rank {one}"
        )
    return Finding(
        code="GC620",
        severity="error",
        quantity="gradient",
        tensor=tensor,
        verdict="differs",
        message=f"in {form} {said}: relative error {each.error:.2e}. The copies of the parameter drift apart.",
        hint="reduce the gradient over all ranks that have a copy.",
        error=number(each.error),
        allow=f"GC620:{tensor}",
    )
