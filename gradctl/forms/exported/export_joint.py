"""The joint graph as an ExportedProgram: run eagerly here, in a ``.pt2`` for AOTInductor and C++ (pytorch 153251).

Its inputs and outputs are tensors in a flat order, with their names in the extra file ``gradctl.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import msgspec
import torch
from torch import Tensor

from gradctl.forms.artifact import read_extra, reading, save_by_torch, unreadable
from gradctl.forms.exported.export import count_operators
from gradctl.forms.form import Captured, not_called
from gradctl.forms.joint_call import JointRuntime, capture_joint, gradient_targets, with_ports, wrap_runtime
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance

_NAMES = "gradctl.json"


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """Names of the inputs and outputs of a joint program, in order, and distributions of its random inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    draws: dict[str, dict[str, int | float | str]] = {}


def capture(instance: Instance) -> Captured:
    """Return forward and backward as one program, run eagerly.

    Raises:
        CannotCapture: the model cannot be traced.
    """
    captured = export_program(instance)
    names, program = captured.artifact
    return _wrap_program(program, names, instance, "the program", seconds=captured.seconds)


def export_program(instance: Instance, *, dynamic: Dynamic | None = None, wrt: Sequence[str] = ("*",)) -> Captured:
    """Return the program as a form that cannot be called yet; its artifact is the names and an ``ExportedProgram``.

    Args:
        instance: the private copy.
        dynamic: symbolic sizes, by input and axis.
        wrt: the leaves to differentiate with respect to, globs of ``param:fc1.weight`` and ``input:x``.

    Raises:
        CannotCapture: the model cannot be traced.
        TargetError: GC104 if ``dynamic`` or ``wrt`` has an unknown name.
    """
    start = perf_counter()
    joint = with_ports(capture_joint(instance, dynamic=dynamic, wrt=wrt), wrt)
    draws = {name: dict(draw) for name, draw in joint.random_inputs.items()}
    artifact = Names(inputs=joint.inputs, outputs=joint.outputs, draws=draws), joint.program
    return Captured("export-joint", not_called, seconds=perf_counter() - start, artifact=artifact)


def save(captured: Captured, path: Path) -> None:
    """Write a program with its names.

    Raises:
        CannotCapture: torch cannot save this one.
        ResourceError: GC131 if the file cannot be written.
    """
    names, program = captured.artifact
    extra = {_NAMES: msgspec.json.encode(names).decode()}
    save_by_torch(
        lambda content: torch.export.save(program, content, extra_files=extra), path, "the joint graph is traced"
    )


def read_gradient_targets(path: Path) -> tuple[str, ...]:
    """Return the leaves whose gradients a ``.pt2`` computes; empty if it is not a joint graph. No code in it runs."""
    names = _names(path)
    return gradient_targets(names.inputs, names.outputs) if names is not None else ()


def load_file(path: Path, instance: Instance) -> Captured:
    """Return the form in a file that this very run wrote, or that the user trusts: loading one runs code in it.

    Raises:
        TargetError: GC141 if it is not a joint graph of this model; GC142 if it cannot be loaded.
    """
    names, program = read(path)
    return _wrap_program(program, names, instance, str(path))


def read(path: Path) -> tuple[Names, torch.export.ExportedProgram]:
    """Return the names and the program in a file that may be loaded, as ``load_file``.

    Raises:
        TargetError: GC142 if it cannot be loaded.
    """
    names = _names(path)
    assert names is not None
    with reading(path):
        return names, torch.export.load(path)


def _names(path: Path) -> Names | None:
    found = read_extra(path, _NAMES)
    try:
        return msgspec.json.decode(found, type=Names) if found is not None else None
    except msgspec.DecodeError as error:
        raise unreadable(path, error) from error


def _wrap_program(
    program: torch.export.ExportedProgram, names: Names, instance: Instance, where: str, *, seconds: float = 0.0
) -> Captured:
    module = program.module(check_guards=False)

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = module(*(feeds[name] for name in names.inputs))
        return dict(zip(names.outputs, found, strict=True))

    return wrap_runtime(
        "export-joint",
        JointRuntime(names.inputs, names.outputs, run),
        instance,
        where,
        operators=count_operators(program),
        artifact=program,
        seconds=seconds,
    )
