"""The figures of a report as files, drawn by matplotlib: PNG for a README or a chat, SVG for print."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from gradctl.core.errors import ResourceError
from gradctl.core.findings import Report
from gradctl.report.figures.all_figures import all_figures
from gradctl.report.figures.drawing import Dot, Drawing, Line, Node, Rectangle, Role, Shape, Text, fitted
from gradctl.report.text.wording import one_line

_PIXELS = 96.0  # an inch, as in CSS
_FONT_SIZE = 11 * 72 / _PIXELS  # points
_PADDING = 12.0
_TITLE = 24.0  # above the figure
_RESOLUTION = 192


def missing() -> str:
    """Return why no plots can be drawn, or nothing."""
    is_there = importlib.util.find_spec("matplotlib") is not None
    return "" if is_there else "matplotlib is not installed: pip install 'gradctl[plots]'."


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write each figure of a report to a folder, as ``NAME.png`` and ``NAME.svg``; return the files.

    Files of the same names are replaced. The same report has the same SVG.

    Raises:
        ResourceError: GC131 if a file cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawing in all_figures(report).items():
            written += _write(drawing, folder / name)
    except OSError as error:
        raise ResourceError(
            "GC131",
            f"{str(folder)!r} cannot be written: {error.strerror}. Give a folder that you may write to.",
            exit_code=2,
        ) from error
    return written


def _write(drawing: Drawing, path: Path) -> list[Path]:
    import matplotlib
    from matplotlib.figure import Figure

    width, height = drawing.width + 2 * _PADDING, drawing.height + 2 * _PADDING + _TITLE
    with matplotlib.rc_context({"svg.hashsalt": "gradctl", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), dpi=_RESOLUTION, facecolor=_colours()["page"])
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(-_PADDING, width - _PADDING), ylim=(height - _PADDING - _TITLE, -_PADDING - _TITLE))
        axes.axis("off")
        title = Text(0, 4 - _TITLE, fitted(one_line(drawing.title), drawing.width), "ink", is_bold=True)
        for order, shape in enumerate([title, *drawing.shapes]):
            _draw(axes, shape, order)
        written = []
        for suffix, metadata in (("png", {"Title": drawing.title}), ("svg", {"Title": drawing.title, "Date": None})):
            file = path.with_name(f"{path.name}.{suffix}")
            figure.savefig(file, metadata=metadata)
            written.append(file)
    return written


@functools.cache
def _colours() -> dict[str, str]:
    """Return the colours of the page by role: those of its style sheet for light screens."""
    sheet = files("gradctl.report.html").joinpath("templates/report.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w+);", sheet.partition("}")[0]))


def _colour(role: Role) -> str:
    return "none" if role == "blank" else _colours()[role]


def _draw(axes: object, shape: Shape, order: int) -> None:
    from matplotlib.axes import Axes
    from matplotlib.patches import Circle, FancyBboxPatch

    assert isinstance(axes, Axes)
    point = 72 / _PIXELS
    look: dict[str, Any]
    match shape:
        case Rectangle(x, y, width, height, fill, edge, radius):
            outline = _colour(edge) if edge else _colours()["grid"] if fill == "blank" else "none"
            style = f"round,pad=0,rounding_size={min(radius, width / 2, height / 2)}" if radius else "square,pad=0"
            dashes = (0, (4, 2)) if shape.is_dashed else "solid"
            look = {"facecolor": _colour(fill), "edgecolor": outline, "linestyle": dashes, "linewidth": point}
            axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, zorder=order, **look))
        case Line(points, role, width):
            look = {"color": _colour(role), "linewidth": width * point}
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, linestyle=(0, (4, 3)) if shape.is_dashed else "solid", zorder=order, **look)
            if shape.has_arrow:
                arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, **look}
                axes.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=order)
        case Dot(x, y, radius, role):
            axes.add_patch(Circle((x, y), radius, color=_colour(role), linewidth=0, zorder=order))
        case Text(x, y, text, role, anchor, is_bold):
            places = {"start": "left", "middle": "center", "end": "right"}
            weight = "bold" if is_bold else "normal"
            look = {"color": _colour(role), "fontsize": _FONT_SIZE, "fontweight": weight, "parse_math": False}
            axes.text(x, y, text, ha=places[anchor], va="baseline", zorder=order, **look)
        case Node(shapes):
            for each in shapes:
                _draw(axes, each, order)
