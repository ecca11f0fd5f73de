"""The text of ``--help``: options below headings, exit codes, and last the examples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from gradctl.core.errors import nearest
from gradctl.core.names import LONGEST_SECONDS, RANK_FORMS, RANK_FORMS_TEXT

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
# In this order in every help text.
HEADINGS = (
    "Target",
    "Inputs",
    "Another implementation",
    "Training steps",
    "What to capture",
    "Passes",
    "What to check",
    "Output",
    "Other options",
)

EXIT_CODES = {
    0: "pass",
    1: "at least one finding fails",
    2: "usage error: command line, configuration, target, inputs or weights",
    3: "internal error of gradctl",
    4: "inconclusive",
    5: "nothing was checked",
    130: "interrupted",
}
# Of a command that checks nothing.
WITHOUT_VERDICT = {0: "success", 2: EXIT_CODES[2], 3: EXIT_CODES[3]}


class _HeadedOption(click.Option):
    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


# click.option for another heading than "What to check".
option = functools.partial(click.option, cls=_HeadedOption)


class FormChoice(click.Choice[str]):
    """One of some forms, or a form of many ranks."""

    def __init__(self, forms: Sequence[str]) -> None:
        super().__init__([*forms, *RANK_FORMS])
        self.text = f"{', '.join(forms)}; {RANK_FORMS_TEXT}"

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return the message on a value that is no form."""
        return f"{value!r} is not one of {self.text}{nearest(str(value), [str(each) for each in self.choices])}."


class FiniteRange(click.FloatRange):
    """A range of finite numbers: NaN is in no range, which click does not say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail with the value that was given."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def choice_option(
    flag: str, metavar: str, values: Sequence[str], text: str, *, heading: str = "What to check"
) -> _Decorator:
    """Return an option with one of ``values``, by default the first; its help is ``text`` and the values."""
    kind, text = click.Choice(values), f"{text}: {', '.join(values)}."
    return option(flag, heading=heading, metavar=metavar, type=kind, default=values[0], show_default=True, help=text)


def timeout_option(text: str) -> _Decorator:
    """Return the option for the seconds that a process of its own may take, by default 300."""
    kind = FiniteRange(1, LONGEST_SECONDS)
    heading = "What to check"
    return option(
        "--timeout", heading=heading, metavar="SECONDS", type=kind, default=300.0, show_default=True, help=text
    )


def output_option(metavar: str, text: str, *, is_required: bool = True) -> _Decorator:
    """Return the option ``-o`` for the file to write."""
    kind: Any = click.Path(path_type=Path)
    return option("-o", "--output", heading="Output", required=is_required, metavar=metavar, type=kind, help=text)


class HelpfulCommand(click.Command):
    """A command whose help has its options below ``HEADINGS``, and its exit codes with their meanings."""

    def __init__(self, *args: Any, exit_codes: Mapping[int, str] = EXIT_CODES, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.exit_codes = exit_codes

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        for each in self.get_params(ctx):
            record = each.get_help_record(ctx) if isinstance(each, click.Option) else None
            if record:
                own = "Other options" if each.is_eager else "What to check"
                sections[getattr(each, "heading", own)].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes, and the epilog."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in self.exit_codes.items()])
        super().format_epilog(ctx, formatter)
