"""The options of a target, described once: for the command line, for ``gradctl.toml``, and for Python.

``--help`` loads this file, so it imports neither torch nor msgspec nor click.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# More than any machine has: the system may refuse them, and then OpenMP ends the process.
MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What a user wants checked: the target, how to load it, and the subcommand that was called.

    ``training`` sets the mode, None leaves it; ``threads`` None leaves torch's; ``sizes`` None leaves the example's;
    ``provider`` None is that of the CPU.
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
    sizes: str | None = None
    max_sizes: int = 12
    provider: str | None = None
    command: str = "gradcheck"


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How ``compare --steps`` trains a model: the number of steps, and the optimizer by name or ``FILE:FACTORY``."""

    steps: int
    optimizer: str = "adamw"


@dataclass(frozen=True, slots=True)
class MeasuringOptions:
    """How ``bench`` measures a form: for how long, and at which batch size; None leaves the example's.

    ``other_batches`` are those on which a compiled form is called afterwards: Dynamo may compile it again.
    """

    seconds: float
    batch: int | None = None
    other_batches: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """How a user sets one field of ``TargetOptions``; a field that is a tuple may be set several times.

    Attributes:
        flag: on the command line.
        key: in an entry of ``[[targets]]``.
        kind: type of one value.
        help, metavar, heading: for ``--help``.
        is_mapping: each value is ``KEY=VALUE``; a table in a configuration.
        is_shared: the key may also stand at the top of a configuration, for all targets.
        minimum, maximum: of a number.
        commands: those that take it; empty for each with a TARGET.
    """

    flag: str
    key: str
    kind: type
    help: str
    metavar: str | None = None
    heading: str = "Target"
    is_mapping: bool = False
    is_shared: bool = False
    minimum: int | None = None
    maximum: int | None = None
    commands: tuple[str, ...] = ()


_ARGUMENT = "Argument of the class or factory. May be repeated."
_THREADS = "Threads of torch.  [default: torch's]"
_INPUT = (
    "Dtype and shape of a random input: x=f32[8,784], ids=i64[8,16]@0..100 (range), w=f32[4]~N(0,1) (distribution); or "
    "a value: flag=True. Without NAME= the input is positional. May be repeated."
)
_INPUTS = "File of inputs by name: .npz, .safetensors or .pt; or the folder of an ONNX test data set (input_0.pb, …)."
_SIZES = (
    "Repeat the check at these sizes of the inputs and in other layouts: 'batch=1,2,7; seq@x:1=1,17' (names of "
    "arguments of example_inputs, or axes NAME@INPUT:AXIS; batch is axis 0)."
)
_MAX_SIZES = "The most combinations of --sizes; of more, a sample with each value."
_PROVIDER = "Execution provider of onnxruntime, for the forms onnx and onnx-joint.  [default: CPUExecutionProvider]"
_LOSS = "Function in the target's file from outputs to a scalar.  [default: sum of all outputs with random weights]"

# By field of ``TargetOptions``, in the order of ``--help``.
OPTIONS = {
    "arguments": Option("--arg", "args", str, _ARGUMENT, "KEY=VALUE", is_mapping=True),
    "input_specs": Option("--input", "input", str, _INPUT, "[NAME=]SPEC", "Inputs"),
    "inputs_file": Option("--inputs", "inputs", Path, _INPUTS, "FILE", "Inputs"),
    "weights": Option("--weights", "weights", Path, "State dict to load: .safetensors or .pt.", "FILE"),
    "training": Option("--train/--eval", "train", bool, "Mode of the model.  [default: as the target sets it]"),
    "loss": Option("--loss", "loss", str, _LOSS, "NAME"),
    "seed": Option("--seed", "seed", int, "Seed of all random generators.", "N", is_shared=True),
    "device": Option("--device", "device", str, "Device of the model and its inputs.", "DEVICE", is_shared=True),
    "threads": Option("--threads", "threads", int, _THREADS, "N", is_shared=True, minimum=1, maximum=MOST_THREADS),
    "sizes": Option("--sizes", "sizes", str, _SIZES, "SIZES", "Inputs", commands=("gradcheck", "compare")),
    "max_sizes": Option(
        "--max-sizes", "max_sizes", int, _MAX_SIZES, "N", "Inputs", minimum=2, commands=("gradcheck", "compare")
    ),
    "provider": Option(
        "--provider",
        "provider",
        str,
        _PROVIDER,
        "NAME",
        is_shared=True,
        commands=("gradcheck", "compare", "export", "bench"),
    ),
}
DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(TargetOptions) if each.name in OPTIONS}
