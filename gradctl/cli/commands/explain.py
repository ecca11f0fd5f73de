"""``gradctl explain [CODE]``: the rule pages."""

from __future__ import annotations

import sys
from itertools import groupby

import click
from click.shell_completion import CompletionItem

from gradctl.cli.help import WITHOUT_VERDICT, HelpfulCommand


def _complete_code(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the rule codes that begin as typed; with their titles, which zsh and fish show."""
    from gradctl.rules.catalogue import codes, title

    return [CompletionItem(code, help=title(code)) for code in codes() if code.startswith(incomplete.upper())]


@click.command(
    cls=HelpfulCommand,
    exit_codes=WITHOUT_VERDICT,
    epilog="\b\nExamples:\n  gradctl explain GC401\n  gradctl explain GC4\n  gradctl explain dropout",
)
@click.argument("text", metavar="[CODE|WORD...]", nargs=-1, shell_complete=_complete_code)
def explain(text: tuple[str, ...]) -> int:
    """Explain a rule code: its meaning, and what to do.

    CODE is a rule code of a report, GC401. The beginning of codes (GC4) or words (dropout) list the rules that match,
    or print the page of the only one. Without arguments, all rules are listed.
    """
    from gradctl.core.errors import nearest
    from gradctl.rules.catalogue import GROUPS, codes, matching_codes, page, title

    given = " ".join(text)
    found = matching_codes(given)
    if not found:
        guess = nearest(given.upper(), codes())
        raise click.UsageError(f"no rule matches {given!r}{guess}. 'gradctl explain' lists all rules.")
    if len(found) > 1:
        for prefix, members in groupby(found, key=lambda code: code[:3]):
            click.echo("\n".join([f"{prefix}xx  {GROUPS[prefix]}", *(f"  {code}  {title(code)}" for code in members)]))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console(highlight=False).print(Markdown(page(found[0])))
    else:
        click.echo(page(found[0]), nl=False)
    return 0
