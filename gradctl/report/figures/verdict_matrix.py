"""The verdicts of targets in their forms, and what of each is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from gradctl.core.findings import Unit
from gradctl.core.names import Quantity, UnitVerdict
from gradctl.report.figures.drawing import CHARACTER, WIDTH, Drawing, Rectangle, Role, Text, fitted
from gradctl.report.text.matrix import QUANTITIES, quantity_word
from gradctl.report.text.wording import one_line, verdict_word

_LETTERS: dict[Quantity, str] = {"output": "O", "gradient": "G", "buffer": "B"}
_FILLS: dict[UnitVerdict, Role] = {
    "pass": "good-soft",
    "fail": "bad-soft",
    "inconclusive": "warn-soft",
    "skipped": "box",
}
_CELL, _ROW, _TOP = 74.0, 36.0, 22.0
_MOST_TARGETS = 60


def quantity_marks(unit: Unit) -> list[tuple[Role, str, str]]:
    """Return the role, the letter and the meaning of the worst verdict on each quantity: ``gradients WRONG`` is G!."""
    marks: list[tuple[Role, str, str]] = []
    for quantity in QUANTITIES:
        word = quantity_word(unit, quantity)
        role: Role = "bad" if word.isupper() else "warn" if word == "?" else "good"
        if word != "-":
            marks.append((role, _LETTERS[quantity] + {"bad": "!", "warn": "?"}.get(role, ""), f"{quantity}s {word}"))
    return marks


def unit_word(unit: Unit) -> str:
    """Return the word for a unit in a matrix: its verdict, or why it has none."""
    return verdict_word(unit) if unit.status in ("complete", "unsupported") else unit.status


def verdict_matrix(units: Sequence[Unit]) -> Drawing | None:
    """Return the matrix of several units; None of one."""
    forms = list(dict.fromkeys(unit.form for unit in units))
    targets = list(dict.fromkeys(unit.target for unit in units))[:_MOST_TARGETS]
    if len(units) < 2:
        return None
    label = min(WIDTH, CHARACTER * max(len(target) for target in targets) + 16)
    drawing = Drawing("verdicts by target and form", label + _CELL * len(forms), _TOP + _ROW * len(targets) + 18)
    drawing.add(*(Text(label + _CELL * place, 12, fitted(form, _CELL), "muted") for place, form in enumerate(forms)))
    for row, target in enumerate(targets):
        drawing.add(Text(0, _TOP + _ROW * row + 14, fitted(one_line(target), label - 8), "ink"))
    for unit in units:
        if unit.target in targets:
            x, y = label + _CELL * forms.index(unit.form), _TOP + _ROW * targets.index(unit.target)
            drawing.add(Rectangle(x, y, _CELL - 4, _ROW - 4, _FILLS[unit.verdict], None, 3))
            drawing.add(Text(x + 6, y + 13, fitted(unit_word(unit), _CELL - 12), "ink", is_bold=unit.verdict == "fail"))
            for place, (role, sign, _) in enumerate(quantity_marks(unit)):
                drawing.add(Text(x + 6 + 20 * place, y + 27, sign, role, is_bold=role == "bad"))
    drawing.add(Text(0, drawing.height - 4, "O outputs, G gradients, B buffers; ! wrong, ? not decided", "muted"))
    return drawing
