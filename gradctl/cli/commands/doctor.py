"""``gradctl doctor``: versions, devices, compilers, and which forms this machine can run."""

from __future__ import annotations

import click


@click.command(epilog="\b\nExample:\n  gradctl doctor --format json")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(("console", "json")),
    default="console",
    show_default=True,
    help="What standard output gets.",
)
def doctor(format_name: str) -> int:
    """Say what this machine can run. Versions, threads, devices, compilers, forms; what is missing has its reason."""
    import json

    from gradctl.commands.doctor import examine

    examined = examine()
    if format_name == "json":
        click.echo(json.dumps(examined.as_mapping(), indent=2))
        return 0
    lines = [
        *(f"{name:<12} {version or 'missing'}" for name, version in examined.versions.items()),
        "",
        f"{'threads':<12} {examined.threads if examined.threads is not None else '-'}",
        f"{'devices':<12} {', '.join(examined.devices) or '-'}",
        f"{'C++ compiler':<12} {examined.compiler or '-'}",
        "",
        *(f"{form:<12} {'yes' if can.available else 'no '}  {can.reason}" for form, can in examined.forms.items()),
    ]
    click.echo("\n".join(lines))
    return 0
