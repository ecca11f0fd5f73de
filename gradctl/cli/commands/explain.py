"""``gradctl explain [CODE]``: the rule pages."""

from __future__ import annotations

import sys

import click

from gradctl.core.errors import nearest


@click.command(epilog="\b\nExample:\n  gradctl explain GC401")
@click.argument("code", required=False)
def explain(code: str | None) -> int:
    """Say what a rule code means and what to do about it. Without CODE, list them all."""
    from gradctl.rules.catalogue import codes, page, title

    if code is None:
        click.echo("\n".join(f"{known}  {title(known)}" for known in codes()))
        return 0
    code = code.upper()
    if code not in codes():
        raise click.UsageError(f"no rule {code!r}{nearest(code, codes())}; 'gradctl explain' lists them.")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console(highlight=False).print(Markdown(page(code)))
    else:
        click.echo(page(code), nl=False)
    return 0
