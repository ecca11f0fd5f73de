"""A page of text: paragraphs, lines that are never broken, and tables. Names and messages on it are never markup."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.cells import cell_len

from gradctl.report.text.wording import printable

_WIDTH_WITHOUT_TERMINAL = 80
_NARROWEST_NAME = 16


class Screen:
    """A page that is printed piece by piece. No word is broken, so that a name can be found in a piped report.

    ``width`` is that of a terminal, in which tables fold the longest names; None stands for a pipe or a file.
    Styles are ANSI codes, ``1;31``, and printed only with ``colour``.
    """

    def __init__(self, width: int | None = None, *, colour: bool = False) -> None:
        self._width, self._colour = width, colour
        self._lines: list[str] = []

    def line(self, text: str = "", style: str = "", *, indent: int = 0) -> None:
        """Print one line, however long: its text may be copied."""
        text = (" " * indent + printable(text)).rstrip()
        self._lines.append(f"\x1b[{style}m{text}\x1b[0m" if self._colour and style else text)

    def paragraph(self, text: str, style: str = "", *, indent: int = 0, hanging: int = 0) -> None:
        """Print lines broken between words; those after the first are indented by ``hanging`` more columns."""
        columns = (self._width or _WIDTH_WITHOUT_TERMINAL) - indent
        wrapper = textwrap.TextWrapper(
            columns, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False
        )
        for part in printable(text).splitlines():
            for line in wrapper.wrap(part):
                self.line(line, style, indent=indent)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 9, indent: int = 0) -> None:
        """Print a table; its first ``names`` columns are text, to the left, and the others numbers, to the right."""
        most = max(heading.count("\n") for heading in headings)
        headings = ["\n" * (most - heading.count("\n")) + heading for heading in headings]  # the last lines in one row
        cells = [[printable(cell) for cell in row] for row in (headings, *rows)]
        widths = [max(map(cell_len, "\n".join(column).split("\n"))) for column in zip(*cells, strict=True)]
        if self._width is not None:
            excess = sum(widths) + 2 * (len(widths) - 1) + indent - self._width
            for column in sorted(range(len(widths[:names])), key=widths.__getitem__, reverse=True):
                folded = max(0, min(excess, widths[column] - _NARROWEST_NAME))
                widths[column], excess = widths[column] - folded, excess - folded
        for row in cells:
            for parts in zip_longest(*map(_folded, row, widths), fillvalue=""):
                blanks = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=True)]
                aligned = [*map(str.__add__, parts[:names], blanks), *map(str.__add__, blanks[names:], parts[names:])]
                self.line("  ".join(aligned), indent=indent)

    def text(self) -> str:
        """Return the page; at most one empty line stands between two others."""
        return re.sub("\n{3,}", "\n\n", "".join(f"{line}\n" for line in self._lines))


def _folded(cell: str, width: int) -> Iterator[str]:
    """Yield a cell in lines of ``width`` columns, broken after a ``/``, ``.`` or ``:`` if there is one."""
    line, _, rest = cell.partition("\n")
    while len(line) > width:
        breaks = [found.end() for found in re.finditer("[/:.]", line[:width])]
        end = breaks[-1] if breaks and breaks[-1] > width // 2 else width
        yield line[:end]
        line = line[end:]
    yield line
    yield from _folded(rest, width) if rest else ()
