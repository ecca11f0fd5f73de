"""Variants of the training step as text: the table of variants, and the tensors that differ after a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gradctl.core.findings import TensorResult, Unit
from gradctl.core.numbers import format_number
from gradctl.report.text.wording import counted, differing_tensors, one_line, verdict_word

STEP_HEADINGS = ("quantity", "tensor", "type", "relative error", "tolerance")
# In the order in which a step computes them; the plural adds an s, but for the state of the optimizer.
_KINDS = ("loss", "gradient", "parameter", "optimizer", "buffer")


def matrix_of_variants(units: Sequence[Unit]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows for variants of the training step of one target."""
    rows = []
    for unit in units:
        first = unit.training.first_difference if unit.training is not None else None
        worst = next(iter(differing_in_a_step(unit.tensors)), None) if first is not None else None
        tensor = "-" if worst is None else f"{_kind(worst)} {_name(worst)}".strip()
        error = "-" if worst is None else format_number(worst.error)
        rows.append([one_line(unit.form), verdict_word(unit), "-" if first is None else str(first), tensor, error])
    return ["variant", "verdict", "first step\nthat differs", "worst tensor", "relative error"], rows


def differing_in_a_step(tensors: Iterable[TensorResult]) -> list[TensorResult]:
    """Return the tensors that differ: the first kind that a step computes first, the worst of a kind first."""
    return sorted(differing_tensors(tensors), key=lambda each: _KINDS.index(_kind(each)))


def counted_in_a_step(unit: Unit) -> str:
    """Return a sentence on how many tensors of each kind differ after the first step that differs."""
    assert unit.training is not None
    total = Counter(_kind(each) for each in unit.tensors)
    differing = Counter(_kind(each) for each in differing_tensors(unit.tensors))
    parts = [_of_kind(kind, differing[kind], total[kind]) for kind in _KINDS if differing[kind]]
    verb = "differs" if differing.total() == 1 else "differ"
    return f"after step {unit.training.first_difference}, {', '.join(parts)} {verb}:"


def step_row(tensor: TensorResult) -> list[str]:
    """Return the cells of a tensor below ``STEP_HEADINGS``."""
    described = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
    return [_kind(tensor), _name(tensor), described, format_number(tensor.error), format_number(tensor.budget)]


def _of_kind(kind: str, differing: int, total: int) -> str:
    if kind == "loss":
        return "the loss"
    noun = "tensor of the optimizer" if kind == "optimizer" else kind
    nouns = counted(total, noun) if kind != "optimizer" or total == 1 else f"{total} tensors of the optimizer"
    return f"{differing} of {nouns}"


def _kind(tensor: TensorResult) -> str:
    if tensor.quantity == "output":
        return "loss"
    if tensor.quantity == "gradient":
        return "gradient"
    return {"param": "parameter", "optimizer": "optimizer"}.get(tensor.tensor.partition(":")[0], "buffer")


def _name(tensor: TensorResult) -> str:
    """Return the name without what the kind says already."""
    return "" if tensor.quantity == "output" else one_line(tensor.tensor.partition(":")[2] or tensor.tensor)
