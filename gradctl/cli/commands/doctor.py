"""``gradctl doctor``: versions, devices, compilers, and which forms this machine can run."""

from __future__ import annotations

import click

from gradctl.cli.help import WITHOUT_VERDICT, HelpfulCommand, choice_option


@click.command(cls=HelpfulCommand, exit_codes=WITHOUT_VERDICT, epilog="\b\nExample:\n  gradctl doctor --format json")
@choice_option("--format", "FORMAT", ("console", "json"), "Format of standard output", heading="Output")
def doctor(format: str) -> int:
    """Show which forms this machine can run.

    Versions, threads, devices and the C++ compiler are shown too; a form that cannot run is shown with the reason.
    """
    import json
    from dataclasses import asdict

    from gradctl.commands.doctor import examine

    examined = examine()
    if format == "json":
        click.echo(json.dumps(asdict(examined), indent=2))
        return 0
    lines = [
        *(f"{name:<12} {version or 'missing'}" for name, version in examined.versions.items()),
        "",
        f"{'threads':<12} {examined.threads if examined.threads is not None else '-'}",
        f"{'devices':<12} {', '.join(examined.devices) or '-'}",
        f"{'C++ compiler':<12} {examined.compiler or '-'}",
        f"{'Triton':<12} {examined.triton}",
        "",
        *(f"{form:<12} {'yes' if can.available else 'no '}  {can.reason}" for form, can in examined.forms.items()),
    ]
    click.echo("\n".join(lines))
    return 0
