"""The joint graph as torch's own program: run eagerly here, in a ``.pt2`` for AOTInductor and C++ (pytorch 153251).

The program takes and gives tensors in a flat order, whose names are in the file beside it, as ``gradctl.json``.
"""

from __future__ import annotations

import io
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import msgspec
import torch
from torch import Tensor

from gradctl.forms.artifact import extra_of, unreadable, unwritable
from gradctl.forms.form import CannotCapture, Captured, not_called
from gradctl.forms.joint_call import JointRuntime, differentiated, joint_of, of_engine
from gradctl.forms.silence import silenced
from gradctl.joint.capture import Joint
from gradctl.subject.frames import first_line, is_out_of_memory
from gradctl.subject.inputs.dynamic_sizes import Dynamic
from gradctl.subject.instance import Instance

__all__ = ["capture", "differentiated_by", "exported", "of_file", "save", "to_float64"]

_NAMES = "gradctl.json"


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """What a joint program takes and gives, in its order, and the distributions of what the caller is to draw."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    draws: dict[str, dict[str, int | float | str]] = {}


def capture(instance: Instance) -> Captured:
    """Return forward and backward as one program, run eagerly.

    Raises:
        CannotCapture: the model cannot be traced.
    """
    captured = exported(instance)
    names, program = captured.artifact
    return _of_program(program, names, instance, "the program", seconds=captured.seconds)


def exported(instance: Instance, *, dynamic: Dynamic | None = None, wrt: Sequence[str] = ("*",)) -> Captured:
    """Return the program: a form that cannot be called yet, its artifact the names and an ``ExportedProgram``.

    Args:
        instance: the private copy.
        dynamic: sizes that stay free, by input and axis.
        wrt: what to differentiate by, globs of ``param:fc1.weight`` and ``input:x``.

    Raises:
        CannotCapture: the model cannot be traced.
        TargetError: GC104 if ``dynamic`` or ``wrt`` names what is not there.
    """
    start = perf_counter()
    joint: Joint = joint_of(instance, dynamic, wrt)
    draws = {name: dict(draw) for name, draw in joint.random_inputs.items()}
    artifact = Names(inputs=joint.inputs, outputs=joint.outputs, draws=draws), joint.program
    return Captured("export-joint", not_called, seconds=perf_counter() - start, artifact=artifact)


def save(captured: Captured, path: Path) -> None:
    """Write a program with its names.

    Raises:
        CannotCapture: torch cannot save this one.
        ResourceError: GC131 if the disk refuses.
    """
    names, program = captured.artifact
    content = io.BytesIO()  # given a path on a disk that fills up, torch's C++ writer ends the process
    try:
        with silenced():
            torch.export.save(program, content, extra_files={_NAMES: msgspec.json.encode(names).decode()})
    except Exception as error:  # serialising may raise anything
        if is_out_of_memory(error):
            raise
        said = f"the joint graph is traced, and torch cannot save it: {first_line(error)}"
        raise CannotCapture(said, traceback.format_exc()) from error
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise unwritable(path, error) from error


def differentiated_by(path: Path) -> tuple[str, ...]:
    """Return what a ``.pt2`` gives gradients by; nothing if it is no joint graph. None of its code is run."""
    names = _names(path)
    return differentiated(names.inputs, names.outputs) if names is not None else ()


def of_file(path: Path, instance: Instance) -> Captured:
    """Return the form in a file that this very run has written, or the user trusts: loading one runs what is in it.

    Raises:
        TargetError: GC141 if it is no joint graph of this model; GC142 if it cannot be loaded.
    """
    names = _names(path)
    assert names is not None
    try:
        with silenced():
            program = torch.export.load(path)
    except Exception as error:  # reading a program may raise anything
        if is_out_of_memory(error):
            raise
        raise unreadable(path, error) from error
    return _of_program(program, names, instance, str(path))


def _names(path: Path) -> Names | None:
    found = extra_of(path, _NAMES)
    try:
        return msgspec.json.decode(found, type=Names) if found is not None else None
    except msgspec.DecodeError as error:
        raise unreadable(path, error) from error


def to_float64(captured: Captured, instance: Instance) -> Captured:
    """Return the promoted copy traced anew."""
    return capture(instance)


def _of_program(
    program: torch.export.ExportedProgram, names: Names, instance: Instance, where: str, *, seconds: float = 0.0
) -> Captured:
    module = program.module(check_guards=False)

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = module(*(feeds[name] for name in names.inputs))
        return dict(zip(names.outputs, found, strict=True))

    operators = Counter(
        str(node.target).removesuffix(".default") for node in program.graph.nodes if node.op == "call_function"
    )
    return of_engine(
        "export-joint",
        JointRuntime(names.inputs, names.outputs, run),
        instance,
        where,
        operators=dict(operators.most_common()),
        artifact=program,
        seconds=seconds,
    )
