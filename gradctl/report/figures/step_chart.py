"""The ladder of step sizes: how far finite differences are from the derivatives that programs state, by step.

Where a program is right, the distance follows the error of the finite difference; where it is wrong, it stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradctl.core.findings import StepLadder
from gradctl.report.figures.drawing import WIDTH, Decades, Dot, Drawing, Line, Role, Text, finite, power

_HEIGHT = 208.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, WIDTH - 14, 44.0, _HEIGHT - 34
# A distance so many times the error of the finite difference is no error of it.
_APART = 10.0
_LEAST = 1e-17  # relative: below it a distance is 0


def step_chart(ladder: StepLadder, form: str, tensor: str) -> Drawing:
    """Return the chart of one ladder; ``form`` names what states the candidate's derivative."""
    steps = [(each.step, derivative, finite(each.error)) for each in ladder.steps if each.step > 0
             if (derivative := finite(each.derivative)) is not None]  # fmt: skip
    stated = [("eager" if ladder.candidate is not None else "autograd", ladder.reference), (form, ladder.candidate)]
    known = [(name, value) for name, number in stated if (value := finite(number)) is not None]
    drawing = Drawing(f"finite differences of {tensor}", WIDTH, _HEIGHT)
    sizes = [abs(value) for value in (*(value for _, value in known), *(each for _, each, _ in steps))]
    size = max(sizes, default=0.0) or 1.0
    errors = [(step, error / size) for step, _, error in steps if error is not None]
    lines = [(name, [(step, abs(each - value) / size) for step, each, _ in steps]) for name, value in known]
    x = Decades.around([step for step, _, _ in steps], _RIGHT, _LEFT)  # the largest step on the left
    shown = [max(value, _LEAST) for _, line in (*lines, ("", errors)) for _, value in line]
    y = Decades.around(shown, _BOTTOM, _TOP)
    _axes(drawing, x, y)
    _curve(drawing, errors, x, y, "muted", is_dashed=True)
    legend: list[tuple[str, Role]] = [("error of the finite difference", "muted")]
    for name, line in lines:
        role: Role = "bad" if _is_apart(line, errors) else "good"
        _curve(drawing, line, x, y, role)
        legend.append((f"distance from {name}", role))
    _legend(drawing, legend)
    return drawing


def _is_apart(line: Sequence[tuple[float, float]], errors: Sequence[tuple[float, float]]) -> bool:
    """Return whether finite differences exclude the stated derivative: at the step that resolves most."""
    step, error = min(errors, key=lambda each: each[1], default=(0.0, 0.0))
    # A form computes in its own dtype: what float32 rounds is no error.
    return dict(line).get(step, 0.0) > max(_APART * error, 1e-4)


def _axes(drawing: Drawing, x: Decades, y: Decades) -> None:
    for exponent in y.ticks(5):
        at = y.at(exponent)
        drawing.add(Line(((_LEFT, at), (_RIGHT, at)), "grid"), Text(_LEFT - 5, at + 4, power(exponent), "muted", "end"))
    for exponent in x.ticks(5):
        at = x.at(exponent)
        drawing.add(Line(((at, _TOP), (at, _BOTTOM)), "grid"))
        drawing.add(Text(at, _BOTTOM + 15, power(exponent), "muted", "middle"))
    drawing.add(Text((_LEFT + _RIGHT) / 2, _HEIGHT - 4, "step, the largest first", "muted", "middle"))


def _curve(
    drawing: Drawing,
    line: Sequence[tuple[float, float]],
    x: Decades,
    y: Decades,
    role: Role,
    *,
    is_dashed: bool = False,
) -> None:
    points = tuple((x.place(step), y.place(value)) for step, value in line)
    if len(points) > 1:
        drawing.add(Line(points, role, 1.25 if is_dashed else 2, is_dashed=is_dashed))
    if not is_dashed:
        drawing.add(*(Dot(*point, 3, role) for point in points))


def _legend(drawing: Drawing, entries: Sequence[tuple[str, Role]]) -> None:
    for row, (text, role) in enumerate(entries):
        at = 10.0 + 13 * row
        drawing.add(Line(((_LEFT, at - 4), (_LEFT + 16, at - 4)), role, 2, is_dashed=role == "muted"))
        drawing.add(Text(_LEFT + 22, at, text, "ink"))
