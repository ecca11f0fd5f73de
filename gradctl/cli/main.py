"""The command ``gradctl``: the table of subcommands, and the one boundary that turns exceptions into exit codes.

Subcommands are imported when they are called, so that ``--help`` and ``--version`` cost no more than click.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from gradctl import __version__
from gradctl.core.errors import GradctlError, ResourceError, TargetError, is_out_of_memory, nearest
from gradctl.core.names import PASSIVE_WAIT

# Name → (module that defines a click command of the same name, its line in ``gradctl --help``).
COMMANDS: dict[str, tuple[str, str]] = {
    "gradcheck": ("gradctl.cli.commands.gradcheck", "Check whether autograd's gradient is the derivative of TARGET."),
    "compare": ("gradctl.cli.commands.compare", "Compare the static forms of TARGET with eager."),
    "trace": ("gradctl.cli.commands.trace", "Capture a static form of TARGET in a verified file."),
    "export": ("gradctl.cli.commands.export", "Export TARGET to a verified ONNX file."),
    "optimize": ("gradctl.cli.commands.optimize", "Optimise the graph of FILE or TARGET, each pass verified."),
    "check": ("gradctl.cli.commands.check", "Check many targets in many forms, each in a process of its own."),
    "init": ("gradctl.cli.commands.init", "Write a gradctl.toml for the models of a folder."),
    "inspect": ("gradctl.cli.commands.inspect", "Show what the gradients of TARGET hang on."),
    "report": ("gradctl.cli.commands.report", "Render a stored report again."),
    "explain": ("gradctl.cli.commands.explain", "Say what a rule code means and what to do about it."),
    "doctor": ("gradctl.cli.commands.doctor", "Say what this machine can run."),
}


class _ClosedPipe(Exception):
    """The reader of standard output left while a help text or a page was written."""


class _LazyGroup(click.Group):
    """A group that lists its commands from ``COMMANDS`` and imports one only to run it or to show its help."""

    # click itself would answer a closed pipe with sys.exit(1), which says "a finding fails".
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Return the context, and name a closed pipe (``--help | head``)."""
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError as error:
            raise _ClosedPipe from error

    def invoke(self, ctx: click.Context) -> Any:
        """Return what the command returns, and name a closed pipe (``explain | head``)."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ClosedPipe from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, imported now, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that ``args`` name; for an unknown word, suggest the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            known = ", ".join(COMMANDS)
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}. There are: {known}.", ctx=ctx)
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
    """Check the gradients of PyTorch models, and say who is wrong.

    Exit codes: 0 pass, 1 a finding fails, 2 usage or configuration, 3 gradctl itself broke, 4 inconclusive,
    5 nothing was checked, 130 interrupted.
    """


def main() -> NoReturn:
    """Run the command line of this process, and exit with its code."""
    os.environ.setdefault(*PASSIVE_WAIT)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Return the exit code of one command line; every exception ends here as one, with its words on stderr."""
    try:
        exit_code = cli.main(arguments, prog_name="gradctl", standalone_mode=False)
        return exit_code if isinstance(exit_code, int) else 0
    except _ClosedPipe:
        silence_stdout()
        return 0
    except BaseException as error:
        return _exit_code(error)


def silence_stdout() -> None:
    """Send what is left for a closed standard output nowhere, or the interpreter complains of it at exit."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # os.devnull is no path
        os.dup2(nowhere.fileno(), 1)


def _exit_code(error: BaseException) -> int:
    """Say what happened, and return its exit code."""
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
    """Return the words for what the user's code raised where no check expected it; None if gradctl did."""
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
        + f"\n\ngradctl itself broke ({type(error).__name__}); please report it with this traceback and the output of "
        "'gradctl doctor'."
    )
    return 3


def _out_of_memory(error: BaseException) -> ResourceError:
    said = (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".")
    return ResourceError(
        "GC803", f"out of memory: {said}. Give a smaller batch (it runs the same code), or free memory and run again."
    )


def _say(text: Any) -> None:
    """Write to stderr; where nobody reads it, the exit code still says what happened."""
    try:
        click.echo(text, err=True)
    except OSError:
        return
