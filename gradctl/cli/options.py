"""The options that say what to check, shared by every command with a TARGET, and the subject that they make."""

from __future__ import annotations

__all__ = [
    "TargetOptions",
    "dynamic_option",
    "free_sizes_from",
    "refuse_other_options",
    "subject_from",
    "target_options",
    "use_threads",
]

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gradctl.cli.users_code import users_code
from gradctl.core.target_options import TargetOptions

if TYPE_CHECKING:
    from gradctl.subject.inputs.dynamic_sizes import Dynamic
    from gradctl.subject.subject import Subject

_Command = TypeVar("_Command", bound=Callable[..., Any])


_OPTIONS = (
    click.argument("target"),
    click.option("--arg", "arguments", metavar="KEY=VALUE", multiple=True, help="Argument of the class or factory."),
    click.option(
        "--input",
        "input_specs",
        metavar="NAME=SPEC",
        multiple=True,
        help="An input: x=f32[8,784], ids=i64[8,16]@0..100, w=f32[4]~N(0,1), flag=True. The name may be left out.",
    ),
    click.option(
        "--inputs",
        "inputs_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Inputs by name: .npz, .safetensors or .pt; or the folder of an ONNX test data set (input_0.pb, …).",
    ),
    click.option(
        "--weights", metavar="FILE", type=click.Path(path_type=Path), help="A state dict: .safetensors or .pt."
    ),
    click.option(
        "--train/--eval", "training", default=None, help="Mode of the model.  [default: as the target leaves it]"
    ),
    click.option(
        "--loss",
        metavar="NAME",
        help="A function beside the target, from outputs to a scalar.  [default: random cotangents on all outputs]",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of every random generator."),
    click.option("--device", default="cpu", show_default=True, help="Where model and inputs go."),
    click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.  [default: as torch has them]"),
)


def target_options(command: _Command) -> _Command:
    """Return ``command`` with TARGET and the options that say what to check, given as ``checking``."""
    names = (
        "target",
        "arguments",
        "input_specs",
        "inputs_file",
        "weights",
        "training",
        "loss",
        "seed",
        "device",
        "threads",
    )

    @functools.wraps(command)
    def with_options(*args: Any, **kwargs: Any) -> Any:
        context = click.get_current_context(silent=True)
        values = {name: kwargs.pop(name) for name in names}
        name = (context.command.name if context else None) or "gradcheck"
        return command(*args, checking=TargetOptions(**values, command=name), **kwargs)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options  # type: ignore[return-value]  # click options hang on the function, whose type stays


def dynamic_option(text: str) -> Callable[[_Command], _Command]:
    """Return the option ``--dynamic`` with this help text; ``free_sizes_from`` reads what it gives."""
    return click.option("--dynamic", metavar="NAME:AXIS=SIZE", multiple=True, help=text)


def free_sizes_from(texts: tuple[str, ...]) -> Dynamic:
    """Return the free sizes by input and axis.

    Raises:
        click.UsageError: a text is none.
    """
    from gradctl.subject.inputs.dynamic_sizes import parse_dynamic

    try:
        return parse_dynamic(texts)
    except ValueError as error:
        raise click.UsageError(f"--dynamic {error}") from error


def refuse_other_options(names: Collection[str], reason: str) -> None:
    """Raise for an option of the running command that is given and has no use, rather than pass it over.

    Args:
        names: parameters that have one.
        reason: what follows the option: ``is for a program; …``.

    Raises:
        click.UsageError: another one is on the command line.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE and parameter.name not in names:
            raise click.UsageError(f"{parameter.opts[0]} {reason}")


def use_threads(checking: TargetOptions) -> None:
    """Let torch have the threads that ``--threads`` asks for."""
    import torch

    if checking.threads is not None:
        torch.set_num_threads(checking.threads)


def subject_from(checking: TargetOptions) -> Subject:
    """Return the subject that the options ask for; what the user's code prints meanwhile goes to stderr.

    Raises:
        GradctlError: as ``load_subject``.
    """
    from gradctl.subject.loading.load import load_subject

    use_threads(checking)
    with users_code():
        return load_subject(
            checking.target,
            arguments=checking.arguments,
            input_specs=checking.input_specs,
            inputs_file=checking.inputs_file,
            weights=checking.weights,
            training=checking.training,
            loss=checking.loss,
            seed=checking.seed,
            device=checking.device,
            command=checking.command,
        )
