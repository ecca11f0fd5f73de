"""What the user wants checked, as plain data: what the command line reads, and what a process of its own is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TargetOptions"]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What the user wants checked. All but ``threads`` are the arguments of ``load_subject``, by name.

    Attributes:
        target: ``path/to/file.py:NAME`` or ``package.module:NAME``.
        arguments: ``key=value`` for a class or factory.
        input_specs: ``x=f32[8,784]``.
        inputs_file: a file of inputs.
        weights: a file of weights.
        training: mode to set; None leaves it.
        loss: name of a function beside the target.
        seed: for every random generator.
        device: where model and inputs go.
        threads: for torch; None leaves them.
        command: the subcommand that was called.
    """

    target: str
    arguments: tuple[str, ...] = ()
    input_specs: tuple[str, ...] = ()
    inputs_file: Path | None = None
    weights: Path | None = None
    training: bool | None = None
    loss: str | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    command: str = "gradcheck"
