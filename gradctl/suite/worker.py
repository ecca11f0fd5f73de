"""The process of one unit: ``python -m gradctl.suite.worker FOLDER`` reads its assignment and leaves its answer there.

The user's code and the compilers may print, exit, hang or crash here. Whatever they do is reported by the
answer, or by its absence (``gradctl.isolation.unit_process``).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from gradctl.core.errors import GradctlError, first_line_of
from gradctl.core.exits import intercept_exits
from gradctl.core.findings import Location, Unit
from gradctl.core.names import NO_GPU, RANK_FORMS
from gradctl.core.target_files import ensure_files
from gradctl.isolation.protocol import (
    ANSWER,
    ASSIGNMENT,
    Answer,
    Assignment,
    UnitRequest,
    inconclusive_unit,
    mentions_out_of_memory,
    read_message,
    write_message,
)
from gradctl.suite.kept_snapshots import ensure_exists

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NOTHING_TO_CHECK = 5
_REPORT_IT = "please report it with the traceback and the output of 'gradctl doctor'."
_LESS_MEMORY = "use a smaller batch (it runs the same code), or a larger memory limit."


def run_unit(request: UnitRequest) -> Unit:
    """Return the verdict on one target in one form, in this process.

    Raises:
        GradctlError: as ``load_subject`` and the check.
    """
    ensure_files(request.checking)
    if request.snapshot is not None and not request.update:
        ensure_exists(request.snapshot)
    if request.form in RANK_FORMS and request.checking.device == "cpu":
        os.environ.update([NO_GPU])
    import torch

    from gradctl.subject.inputs.sizes import sizes_from
    from gradctl.subject.loading.load import load_subject

    if request.checking.threads is not None:
        torch.set_num_threads(request.checking.threads)
    if request.snapshot is not None:
        return _snapshot_unit(request, request.snapshot)
    subject = load_subject(request.checking)
    if request.training is not None:
        from gradctl.commands.compare_steps import compare_steps

        (unit,) = compare_steps(
            subject,
            request.training.steps,
            optimizer=request.training.optimizer,
            variants=[request.form],
            is_named=request.named,
            target=request.checking.target,
            allows=request.allows,
            fail_on=request.fail_on,
        )
        return unit
    if request.measuring is not None:
        from gradctl.commands.bench import bench_one

        return bench_one(
            subject,
            request.form,
            request.measuring,
            named=request.named,
            allows=request.allows,
            fail_on=request.fail_on,
        )
    sizes = sizes_from(request.checking.sizes)
    limit = request.checking.max_sizes
    if request.form == "eager":
        from gradctl.gradients.size_sweep import gradcheck_at_sizes

        return gradcheck_at_sizes(subject, sizes, limit=limit, allows=request.allows, fail_on=request.fail_on)
    from gradctl.commands.compare_sizes import compare_one_at_sizes

    return compare_one_at_sizes(
        subject,
        request.form,
        sizes,
        limit=limit,
        named=request.named,
        allows=request.allows,
        fail_on=request.fail_on,
        bisect=request.bisect,
        rank_seconds=request.timeout_seconds,
    )


def _snapshot_unit(request: UnitRequest, path: Path) -> Unit:
    """Return the verdict on a target and its snapshot, which is of the CPU whatever device the target is checked on."""
    from gradctl.commands.check_snapshot import check_snapshot
    from gradctl.subject.loading.load import load_subject

    checking = replace(request.checking, device="cpu")
    return check_snapshot(
        path,
        load_subject(checking),
        options=checking,
        device=None if request.update or request.checking.device == "cpu" else request.checking.device,
        update=request.update,
        allows=request.allows,
        fail_on=request.fail_on,
    )


def main() -> NoReturn:
    """Answer the assignment in the folder that ``sys.argv`` names, and end."""
    faulthandler.enable()
    if hasattr(faulthandler, "register"):  # not on Windows
        # A process that exceeds its time limit writes its traceback; then the signal has its usual effect.
        faulthandler.register(signal.SIGTERM, chain=True)
    leave, folder = os._exit, Path(sys.argv[1])
    assignment = read_message(folder / ASSIGNMENT, Assignment)
    _die_with(assignment.supervisor)
    request = assignment.request
    sys.argv = [request.checking.target]  # a target that parses arguments finds none of ours
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what was printed before a crash is not lost with its buffer

    def answer(unit: Unit) -> None:
        write_message(folder / ANSWER, Answer(nonce=assignment.nonce, unit=unit))

    start = time.perf_counter()

    def told(status: int, file: str, line: int) -> int:
        reason = f"the program that is checked ended the process: os._exit({status})"
        hint, seconds = "raise an exception there instead.", time.perf_counter() - start
        location = Location(file=file, line=line)
        answer(inconclusive_unit(request, "crashed", "GC801", reason, hint=hint, location=location, seconds=seconds))
        return status

    _limit_memory(request)
    with intercept_exits(told):
        try:
            unit = run_unit(request)
        except BaseException as error:  # whatever the user's code and the compilers raise
            unit = _explained(request, error, time.perf_counter() - start)
        answer(unit)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have put anything there
            stream.flush()
    # Threads, exit handlers and destructors of the user's can hang or crash; the answer is given, and nothing is lost.
    leave(0)


def _explained(request: UnitRequest, error: BaseException, seconds: float) -> Unit:
    """Return the unit of a check that ended with an exception."""
    if not isinstance(error, GradctlError):
        details = "".join(traceback.format_exception(error))
        return inconclusive_unit(request, **_ending(request, error), details=details, seconds=seconds)
    unit = inconclusive_unit(request, "error", error.code, error.message, details=error.details, seconds=seconds)
    if error.exit_code == _NOTHING_TO_CHECK:
        return msgspec.structs.replace(unit, status="unsupported", verdict="skipped")
    return unit


def _ending(request: UnitRequest, error: BaseException) -> dict[str, Any]:
    """Return status, code, reason, hint and location of an exception that gradctl did not mean to raise."""
    said = first_line_of(error)
    named = f"{type(error).__name__}: {said}" if str(error) else type(error).__name__
    if _is_out_of_memory(request, error, said):
        return {"status": "error", "code": "GC803", "reason": f"out of memory: {said}", "hint": _LESS_MEMORY}
    if not isinstance(error, Exception):  # neither ours nor torch's: a program raises these to end itself
        ended = f"ended the process: sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {named}"
        return {"status": "crashed", "code": "GC801", "reason": f"the program that is checked {ended}"}
    location = _users_line(error)
    if location is not None:
        reason = f"{request.checking.target} raises in a call after the first: {type(error).__name__}: {said}"
        return {"status": "error", "code": "GC111", "reason": reason, "location": location}
    reason = f"internal error of gradctl: {type(error).__name__}: {said}"
    return {"status": "error", "code": "GC801", "reason": reason, "hint": _REPORT_IT}


def _is_out_of_memory(request: UnitRequest, error: BaseException, said: str) -> bool:
    # If torch cannot be loaded within the memory limit, the error may name another cause.
    is_starved = request.memory_limit_bytes is not None and "torch" not in sys.modules
    return is_starved or type(error).__name__ in ("MemoryError", "OutOfMemoryError") or mentions_out_of_memory(said)


def _users_line(error: Exception) -> Location | None:
    """Return the line of the user's that raised; None if it was ours, or if torch is not there to be told apart."""
    if "torch" not in sys.modules:
        return None
    from gradctl.subject.frames import raised_at

    place = raised_at(error)
    return Location(file=place[0], line=place[1]) if place is not None else None


def _die_with(supervisor: int) -> None:
    """Let the kernel kill this process when the thread that started it is gone; end now if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "getppid") and os.getppid() != supervisor:
        os._exit(1)


def _limit_memory(request: UnitRequest) -> None:
    """Limit the address space; a GPU's driver maps far more than it uses, so on the CPU only."""
    if request.memory_limit_bytes is None or request.checking.device != "cpu":
        return
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = request.memory_limit_bytes
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
