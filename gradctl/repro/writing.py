"""``--repro DIR``: for each failing finding a program of plain torch that fails in the same way, as small as it gets.

One a form and rule code, for the worst finding. A search in a process of its own makes it smaller while it still
fails, and what is kept has been run by plain Python once more: a script that does not return 1 is never written.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.autograd import Function

from gradctl import __version__
from gradctl.core.assembly import environment
from gradctl.core.errors import GradctlError
from gradctl.core.findings import Finding, Unit
from gradctl.core.names import RANK_FORMS, SEVERITIES
from gradctl.core.target_files import Target, parse_target
from gradctl.core.target_options import TargetOptions
from gradctl.gradients.guard import explaining, unexplained
from gradctl.repro.script_text import SCRIPT, Candidate, Recipe, Unwritable, write
from gradctl.repro.search import FAILING, RECIPE, SOURCES, WHOLE, state_of
from gradctl.repro.sources import copy_sources
from gradctl.subject.instance import loss_takes_inputs
from gradctl.subject.loading.arguments import parse_arguments
from gradctl.subject.loading.library_operator import operator_function
from gradctl.subject.loading.target import find_target, import_target, on_import_path
from gradctl.subject.seeding import preserve_generators, seed_generators
from gradctl.subject.subject import Subject

_SEARCH_SECONDS = 60.0
_RUN_SECONDS = 120.0  # of one script: inductor builds C++
# Python's search path is the parent's, so that the imports of the user's files are found again.
_START = "import sys; sys.path[:] = {path!r}; from gradctl.repro.search import main; main()"

_OF_EAGER = {"GC401": "gradient", "GC403": "gradient", "GC408": "gradient"}
_OF_FORM = {"GC301": "output", "GC302": "buffer", "GC303": "raises", "GC402": "gradient", "GC403": "gradient"}
_CALLED = {
    "trace": "torch.jit.trace",
    "script": "torch.jit.script",
    "export": "torch.export",
    "aot": 'torch.compile(backend="aot_eager")',
    "compile": "torch.compile",
    "onnx": "torch.onnx.export, run by onnxruntime",
}
_HAPPENS = {
    "output": "computes another output than eager",
    "buffer": "leaves another state than eager",
    "gradient": "computes another gradient than eager",
    "raises": "captures a model that eager runs, and raises",
}
_FINITE_DIFFERENCES = 1e-4  # below it gradctl calls a gradient approximate, which does not fail


class _NoRepro(Exception):
    """There is no program for a finding; the message is the reason, the end of a sentence."""


@dataclass(frozen=True, slots=True)
class _Case:
    """One finding, with all that it came from."""

    unit: Unit
    finding: Finding
    checking: TargetOptions
    subject: Subject
    allows: Sequence[str]


def write_repros(
    units: Sequence[Unit],
    checking: TargetOptions,
    subject: Subject,
    directory: Path,
    *,
    allows: Sequence[str] = (),
    fail_on: str = "error",
    say: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> list[Unit]:
    """Return the units, the findings for which a program was written with its path.

    Args:
        units: the verdicts on ``subject``.
        checking: how the user named it.
        subject: the model and its inputs; not changed.
        directory: made if need be; a program of the same name in it is replaced whole.
        allows: accepted findings.
        fail_on: the mildest severity that fails.
        say: called with one sentence for a finding without a program: the reason.
        progress: called with a line before each program.
    """
    written = []
    for unit in units:
        findings = list(unit.findings)
        with unexplained() as failures:
            for index in _worst_of_each_code(unit, fail_on):
                finding = findings[index]
                (progress or (lambda text: None))(f"making a small program that shows {finding.code} ({unit.form})")
                with explaining(f"{finding.code} by a small program"):
                    try:
                        script = _write_one(_Case(unit, finding, checking, subject, allows), directory)
                        findings[index] = msgspec.structs.replace(finding, repro=str(script))
                    except _NoRepro as error:
                        say(f"no repro for {finding.code} ({unit.form}): {error}.")
        details = "\n".join(part for part in (unit.details, failures.details()) if part) or None
        findings += failures.notes()
        written.append(msgspec.structs.replace(unit, findings=tuple(findings), details=details))
    return written


def _worst_of_each_code(unit: Unit, fail_on: str) -> list[int]:
    """Return the places of the first failing finding of each code; what only follows from another has none."""
    serious = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    failing = [(i, each) for i, each in enumerate(unit.findings) if each.severity in serious and not each.allowed]
    codes = {each.code for _, each in failing}
    first: dict[str, int] = {}
    for index, each in failing:
        if each.cause == each.code or each.cause not in codes:
            first.setdefault(each.code, index)
    return list(first.values())


def _write_one(case: _Case, directory: Path) -> Path:
    """Return the script for one finding, written and run.

    Raises:
        _NoRepro: no script shows the finding.
    """
    quantity = _quantity(case.unit, case.finding)
    if case.unit.status != "complete" or quantity is None:
        raise _NoRepro("a script of plain torch does not show findings of this kind")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".repro-", dir=directory, ignore_cleanup_errors=True) as name:
            folder = Path(name).resolve()
            recipe = _recipe(case, quantity, folder / SOURCES)
            found = _smallest(recipe, case.subject, folder)
            final = directory / _folder_name(case.unit, case.finding)
            if final.exists():
                shutil.rmtree(final)
            found.replace(final)
            return final / SCRIPT
    except OSError as error:
        raise _NoRepro(f"{directory} cannot be written: {error.strerror or error}") from error


def _smallest(recipe: Recipe, subject: Subject, folder: Path) -> Path:
    """Return the folder of the smallest program that returns 1 when it is run by plain Python."""
    inputs = (subject.args, subject.kwargs)
    try:
        write(recipe, Candidate(inputs, inputs, state=state_of(subject.module)), folder / WHOLE, folder / SOURCES)
    except Unwritable as error:
        raise _NoRepro(f"{error}, which a script cannot be given") from error
    (folder / RECIPE).write_bytes(msgspec.json.encode(recipe))
    path = [entry for entry in sys.path if isinstance(entry, str)]
    command = [sys.executable, "-P", "-c", _START.format(path=path), str(folder), str(_SEARCH_SECONDS)]
    (folder / FAILING).touch()
    said = _run(command, folder, _SEARCH_SECONDS + _RUN_SECONDS / 2)[1]
    for name in reversed((folder / FAILING).read_text(encoding="utf-8").split()):
        if _run([sys.executable, SCRIPT], folder / name, _RUN_SECONDS)[0] == 1:
            shutil.rmtree(folder / name / "__pycache__", ignore_errors=True)
            return folder / name
    last = [line for line in said.splitlines() if line.strip()][-1:]
    ended = "".join(f" (it ended with: {line})" for line in last if "the bug is" not in line)
    raise _NoRepro(f"a script of plain torch does not show it{ended}")


def _run(command: Sequence[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Return exit status and output of a program; None if it took too long. Its own processes are ended too."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.returncode is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:  # Windows
                process.kill()
            process.communicate()


def _quantity(unit: Unit, finding: Finding) -> str | None:
    if unit.form in RANK_FORMS:
        return None
    if unit.form != "eager":
        return _OF_FORM.get(finding.code)
    if finding.code == "GC407" and finding.quantity in ("output", "gradient"):
        return f"nan {finding.quantity}"
    return _OF_EAGER.get(finding.code)


def _recipe(case: _Case, quantity: str, sources: Path) -> Recipe:
    """Return the common part of the programs for a finding, after copying the user's files."""
    unit, finding, checking, subject = case.unit, case.finding, case.checking, case.subject
    try:
        target = parse_target(checking.target)
        if target.model is not None:
            raise _NoRepro(f"no file defines its model ({checking.target})")
        with on_import_path(target.root), preserve_generators():
            seed_generators(checking.seed)
            build = _build(target, checking, subject)
    except GradctlError as error:
        raise _NoRepro(f"its model cannot be made anew from a target ({error})") from error
    in_float64 = unit.form == "eager" and not quantity.startswith("nan ")
    return Recipe(
        form=unit.form,
        quantity=quantity,
        tolerance=_FINITE_DIFFERENCES if in_float64 else _tolerance(unit, finding),
        module=copy_sources(target, sources),
        build=build,
        training=checking.training,
        loss=checking.loss or "",
        loss_takes_inputs=subject.loss is not None and loss_takes_inputs(subject.loss),
        seed=checking.seed,
        threads=torch.get_num_threads(),
        device=checking.device,
        report=_report(unit, finding, checking, quantity),
        start=tuple(_start(finding)),
        only_plain=in_float64 and _is_guarded(unit),
        allows=tuple(case.allows),
    )


def _build(target: Target, checking: TargetOptions, subject: Subject) -> str:
    """Return the expression of ``source`` that makes the model, as ``gradctl.subject.loading.factory`` does."""
    name, found = find_target(target, import_target(target))
    if "::" in name:
        return f"torch.ops.{name.replace('::', '.')}"  # registered by the import of source
    expression = functools.reduce(_attribute, name.split("."), "source")
    values = parse_arguments(checking.arguments)
    call = f"{expression}({', '.join(f'{key}={value!r}' for key, value in values.items())})"
    if operator_function(found) is not None:
        return expression
    if inspect.isclass(found):
        return f"{expression}.apply" if issubclass(found, Function) else call
    if isinstance(found, nn.Module):
        return f"copy.deepcopy({expression})"
    is_model_itself = getattr(found, "__qualname__", found) == getattr(subject.model, "__qualname__", subject.model)
    if is_model_itself and getattr(found, "__module__", None) == getattr(subject.model, "__module__", None):
        return expression
    return f"{call}.apply" if subject.function is not None else call


def _attribute(expression: str, name: str) -> str:
    is_plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{expression}.{name}" if is_plain else f"getattr({expression}, {name!r})"


def _tolerance(unit: Unit, finding: Finding) -> float:
    """Return a tolerance between rounding and the error of the finding: a thousandth if possible."""
    rows = [row for row in unit.tensors if (row.quantity, row.tensor) == (finding.quantity, finding.tensor)]
    budget = next((row.budget for row in rows if isinstance(row.budget, float)), 0.0)
    error = next((row.error for row in rows if isinstance(row.error, float)), 1.0)
    return min(max(10 * budget, min(1e-3, error / 10)), error / 2) or 1e-3


def _is_guarded(unit: Unit) -> bool:
    """Return whether gradctl treated as a constant what finite differences in a plain script change."""
    cuts = unit.oracle is not None and unit.oracle.held_fixed
    return bool(cuts) or any(each.code == "GC409" or (each.allowed and each.code == "GC408") for each in unit.findings)


def _start(finding: Finding) -> Iterator[str]:
    """Yield the paths of the parts that the bug may be in, the likeliest first."""
    if finding.location is not None and finding.location.module:
        yield finding.location.module
    if finding.tensor is not None and finding.tensor.startswith(("param:", "buffer:")):
        path = finding.tensor.partition(":")[2].rpartition(".")[0]
        if path:
            yield path


def _report(unit: Unit, finding: Finding, checking: TargetOptions, quantity: str) -> str:
    """Return the docstring: the report for a maintainer of torch, or of the model."""
    if unit.form != "eager":
        title = f"{_CALLED[unit.form]} {_HAPPENS[quantity]}"
        expected = "the captured model computes what eager computes, up to rounding"
    elif quantity.startswith("nan "):
        title = f"{'The output' if quantity == 'nan output' else 'A gradient'} is NaN or infinite"
        expected = "finite values for finite inputs and weights"
    else:
        title = "Autograd's gradient is not the derivative of the forward"
        expected = "autograd's derivative along any direction is that of finite differences in float64"
    form = "" if unit.form == "eager" else f" --form {unit.form}"
    versions = environment(checking.device)
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnx", "onnxruntime", "python"))
    place = [f"Where: {finding.location}"] if finding.location is not None and str(finding.location) else []
    lines = [
        f"{title}.",
        "",
        f"What happens: {finding.message}",
        f"What is expected: {expected}.",
        *place,
        f"Found by: gradctl {__version__} {checking.command} {checking.target}{form} (seed {checking.seed}, "
        f"{finding.code}).",
        f"Versions: {packages}, {platform.platform()}, {versions['threads']} threads, device {versions['device']}.",
        "",
        "Run it by: python repro.py",
        "It exits 1 while the bug is there, 0 once it is gone, and 2 if it cannot be run.",
    ]
    return "\n".join(_wrapped(lines))


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, 110, break_long_words=False, break_on_hyphens=False) or [""]


def _folder_name(unit: Unit, finding: Finding) -> str:
    about: Any = finding.tensor or (finding.allow or "").partition(":")[2] or "model"
    return re.sub(r"[^\w.-]+", "-", f"{finding.code.lower()}-{unit.form}-{about}")
