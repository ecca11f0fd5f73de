"""The options that say what to check, shared by every command with a TARGET, and the subject that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from gradctl.cli.help import option
from gradctl.cli.reporting import REPORT_PARAMETERS
from gradctl.cli.users_code import users_code
from gradctl.core.target_options import DEFAULTS, OPTIONS, Option, TargetOptions

if TYPE_CHECKING:
    from gradctl.subject.inputs.dynamic_sizes import Dynamic
    from gradctl.subject.inputs.sizes import Sizes
    from gradctl.subject.subject import Subject

_Command = TypeVar("_Command", bound=Callable[..., Any])


def target_options(command: _Command) -> _Command:
    """Return ``command`` with TARGET and the options that say what to check, given as ``checking``."""
    names = [name for name, each in OPTIONS.items() if not each.commands or command.__name__ in each.commands]

    @functools.wraps(command)
    def with_options(*args: Any, target: str, **kwargs: Any) -> Any:
        context = click.get_current_context(silent=True)
        name = (context.command.name if context else None) or "gradcheck"
        values = {each: kwargs.pop(each) for each in names}
        return command(*args, checking=TargetOptions(target, **values, command=name), **kwargs)

    for name in reversed(names):
        with_options = _click_option(name, OPTIONS[name], DEFAULTS[name])(with_options)
    # click keeps the options in an attribute of the function, whose type stays.
    return click.argument("target", shell_complete=_complete_file)(with_options)  # type: ignore[return-value]


def _complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a TARGET as the name of a file; what follows the colon is in the file."""
    return [CompletionItem(incomplete, type="file")]


def _click_option(name: str, described: Option, default: Any) -> Callable[[_Command], _Command]:
    kind: Any = (
        click.IntRange(described.minimum, described.maximum) if described.minimum is not None else described.kind
    )
    return option(
        described.flag,
        name,
        heading=described.heading,
        metavar=described.metavar,
        multiple=default == (),
        type=click.Path(path_type=Path) if described.kind is Path else kind,
        default=default,
        show_default=default not in (None, ()),
        help=described.help,
    )


def dynamic_option(condition: str = "") -> Callable[[_Command], _Command]:
    """Return the option ``--dynamic``, whose value ``free_sizes_from`` parses; ``condition`` says when it applies."""
    text = f"Make the size of an input symbolic, for example x:0=batch{condition}. May be repeated."
    return option("--dynamic", heading="Inputs", metavar="NAME:AXIS=SIZE", multiple=True, help=text)


def free_sizes_from(texts: tuple[str, ...]) -> Dynamic:
    """Return the free sizes by input and axis.

    Raises:
        click.UsageError: a text is not NAME:AXIS=SIZE.
    """
    from gradctl.subject.inputs.dynamic_sizes import parse_dynamic

    try:
        return parse_dynamic(texts)
    except ValueError as error:
        raise click.UsageError(f"--dynamic {error}") from error


def refuse_other_options(names: Collection[str], reason: str) -> None:
    """Raise a usage error for an option on the command line that is not among ``names``, nor one of reports.

    ``reason`` follows the option in the message: ``applies to a program, …``.
    """
    context = click.get_current_context()
    applicable = {*names, *REPORT_PARAMETERS}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE and parameter.name not in applicable:
            raise click.UsageError(f"{parameter.opts[0]} {reason}")


def sizes_of(checking: TargetOptions, repro: Path | None) -> Sizes:
    """Return the sizes of ``--sizes``, none without the option.

    Raises:
        click.UsageError: ``--repro`` is given, too: a program is written for the inputs of the example.
        TargetError: GC128 if the text is no sizes.
    """
    from gradctl.subject.inputs.sizes import sizes_from

    if checking.sizes is not None and repro is not None:
        raise click.UsageError("--repro writes programs for the sizes of the example. Omit --sizes, and pass --input.")
    return sizes_from(checking.sizes)


def ensure_provider_applies(checking: TargetOptions, forms: Collection[str]) -> None:
    """Raise a usage error for ``--provider`` if none of the forms runs in onnxruntime."""
    if checking.provider is not None and not {"onnx", "onnx-joint"} & set(forms):
        raise click.UsageError("--provider applies to the forms onnx and onnx-joint, and to .onnx files. Omit it.")


def use_threads(checking: TargetOptions) -> None:
    """Set the threads of torch to ``--threads``, if it is given."""
    import torch

    if checking.threads is not None:
        torch.set_num_threads(checking.threads)


def subject_from(checking: TargetOptions) -> Subject:
    """Return the subject of the options; what the user's code prints meanwhile goes to stderr.

    Raises:
        GradctlError: as ``load_subject``.
    """
    from gradctl.subject.loading.load import load_subject

    use_threads(checking)
    with users_code():
        return load_subject(checking)
