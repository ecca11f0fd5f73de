"""The command ``gradctl``: the table of subcommands, and the one boundary that turns exceptions into exit codes.

Subcommands are imported when they are called, so that ``--help`` and ``--version`` import little more than click.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from gradctl import __version__
from gradctl.cli.help import HelpfulCommand
from gradctl.core.errors import GradctlError, ResourceError, TargetError, first_line_of, is_out_of_memory, nearest
from gradctl.core.names import PASSIVE_WAIT

# Name → (module that defines a click command of the same name, its line in ``gradctl --help``).
COMMANDS: dict[str, tuple[str, str]] = {
    "gradcheck": ("gradctl.cli.commands.gradcheck", "Check whether autograd's gradient is the derivative of TARGET."),
    "compare": (
        "gradctl.cli.commands.compare",
        "Compare the static forms of TARGET with eager, or another implementation with TARGET.",
    ),
    "bench": ("gradctl.cli.commands.bench", "Measure what each form of TARGET costs, and whether it is right."),
    "snapshot": ("gradctl.cli.commands.snapshot", "Record the outputs and gradients of TARGET in a file."),
    "verify": ("gradctl.cli.commands.verify", "Check whether a model still computes what a snapshot holds."),
    "trace": ("gradctl.cli.commands.trace", "Capture TARGET as TorchScript or torch.export, in a verified file."),
    "export": ("gradctl.cli.commands.export", "Export TARGET to a verified ONNX file."),
    "optimize": ("gradctl.cli.commands.optimize", "Optimise the ONNX graph of FILE or TARGET; verify each pass."),
    "check": ("gradctl.cli.commands.check", "Check many targets in many forms, each in a process of its own."),
    "init": ("gradctl.cli.commands.init", "Write a gradctl.toml for the models of a folder."),
    "inspect": ("gradctl.cli.commands.inspect", "Show what affects the gradients of TARGET."),
    "report": ("gradctl.cli.commands.report", "Print a stored report in another format."),
    "explain": ("gradctl.cli.commands.explain", "Explain a rule code: its meaning, and what to do."),
    "doctor": ("gradctl.cli.commands.doctor", "Show which forms this machine can run."),
}

# The environment variable in which a shell asks for completions, as click names it.
_COMPLETION = "_GRADCTL_COMPLETE"


class _LazyGroup(click.Group, HelpfulCommand):
    """A group that lists its commands from ``COMMANDS`` and imports one only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, imported now, or None if the name is unknown."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` name; for an unknown name, suggest the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            known = ", ".join(COMMANDS)
            guess = nearest(args[0], COMMANDS)
            raise click.UsageError(f"unknown command {args[0]!r}{guess}. Commands: {known}.", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  gradctl gradcheck sample_models/mlp.py",
)
@click.version_option(__version__, prog_name="gradctl", message="%(prog)s %(version)s")
def cli() -> None:
    """Check the gradients of PyTorch models, and locate the tensor, function and line that are wrong."""


def main() -> NoReturn:
    """Run the command line of this process, and exit with its code."""
    os.environ.setdefault(*PASSIVE_WAIT)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Return the exit code of one command line; every exception becomes one here, with a message on stderr."""
    try:
        if instruction := os.environ.get(_COMPLETION):
            return _complete(instruction)
        # click's own main would end with 1 at a closed pipe (``--help | head``), which means "a finding fails".
        with cli.make_context("gradctl", list(arguments)) as context:
            exit_code = cli.invoke(context)
        return exit_code if isinstance(exit_code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        silence_stdout()
        return 0
    except BaseException as error:
        return _exit_code(error)


def _complete(instruction: str) -> int:
    """Print the completion script, or the completions, that a shell asks for with ``instruction``."""
    from click.shell_completion import shell_complete

    if shell_complete(cli, {}, "gradctl", _COMPLETION, instruction):
        raise click.UsageError(f"unknown {_COMPLETION}={instruction}. Use bash_source, zsh_source or fish_source.")
    return 0


def silence_stdout() -> None:
    """Redirect a closed standard output to nowhere: else the interpreter reports an error at exit."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # os.devnull is no path
        os.dup2(nowhere.fileno(), 1)


def _exit_code(error: BaseException) -> int:
    """Print the message of an exception, and return its exit code."""
    if isinstance(error, GradctlError):
        return _explained(error)
    if isinstance(error, click.ClickException):
        return _misused(error)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        _say("interrupted")
        return 130
    if is_out_of_memory(error):
        return _explained(_out_of_memory(error))
    raised = _raised_by_the_model(error)
    return _explained(raised) if raised is not None else _broke(error)


def _misused(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _say(error.format_message())
    else:
        usage = f"{context.get_usage()}\nTry '{context.command_path} --help'.\n\n" if context else ""
        _say(f"{usage}Error: {error.format_message()}")
    return 2


def _explained(error: GradctlError) -> int:
    _say("\n".join(part for part in (str(error), error.details.rstrip()) if part))
    return error.exit_code


def _raised_by_the_model(error: BaseException) -> TargetError | None:
    """Return the error for an exception of the user's code that no check expected; None if gradctl raised it."""
    if "torch" not in sys.modules:
        return None
    from gradctl.subject.frames import first_line, raised_at, user_frames

    place = raised_at(error)
    if place is None:
        return None
    said = f"the model raises in a call after the first: {first_line(error)} ({place[0]}:{place[1]})."
    return TargetError("GC111", said, details=user_frames(error))


def _broke(error: BaseException) -> int:
    _say(
        "".join(traceback.format_exception(error)).rstrip()
        + f"\n\ninternal error of gradctl ({type(error).__name__}): please report it with this traceback and the "
        "output of 'gradctl doctor'."
    )
    return 3


def _out_of_memory(error: BaseException) -> ResourceError:
    said = first_line_of(error)
    return ResourceError(
        "GC803", f"out of memory: {said}. Use a smaller batch (it runs the same code), or free memory and run again."
    )


def _say(text: Any) -> None:
    """Write to stderr; if it is closed, the exit code still states the result."""
    try:
        click.echo(text, err=True)
    except OSError:
        return
