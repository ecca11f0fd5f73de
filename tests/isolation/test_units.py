"""Units that crash, hang, exit and print, among good ones, and supervisors that are interrupted or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gradctl.core.findings import Location, Unit
from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import Assignment, read_answer, read_message, write_message
from gradctl.isolation.units import UnitRequest, run_units
from tests.isolation.faulty import is_gone, written

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc and address-space limits")

LINE = 10  # of the first line of the body

# What a model does in its forward → status, code and reason of its unit.
FAULTS = {
    "segfault": ("ctypes.string_at(0)", "crashed", "GC801", "the process died of signal 11 (SIGSEGV)"),
    "abort": ("os.abort()", "crashed", "GC801", "the process died of signal 6 (SIGABRT)"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "crashed", "GC801", "the process died of signal 9 (SIGKILL)"),
    "exit": ("os._exit(0)", "crashed", "GC801", "the program that is checked ended the process: os._exit(0)"),
    "exit in C": (
        "ctypes.CDLL(None)._exit(0)",
        "crashed",
        "GC801",
        "the process ended with exit status 0 and no answer",
    ),
    "hang": ("threading.Event().wait()", "timeout", "GC802", "no answer in 12 s"),
    "deaf hang": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait()",
        "timeout",
        "GC802",
        "no answer in 12 s",
    ),
    "C++ out of memory": (
        "print('terminate called after throwing std::bad_alloc', file=sys.stderr); os.abort()",
        "crashed",
        "GC803",
        "out of memory: the process died of signal 6 (SIGABRT)",
    ),
}
GOOD = {
    "silent": "pass",
    "loud": r"os.write(1, b'\xff\x00{}' * (1 << 20)); print('{' * (1 << 20))",
    "leaves a thread": "threading.Thread(target=threading.Event().wait).start()",
    "crashes at exit": "import atexit; atexit.register(os.abort)",
    "shares the cores": "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'",
    "reads": "assert sys.stdin.read() == '' and len(sys.argv) == 1",
}


def request(path, body="pass", *, timeout_seconds=60, **more):
    written(path, body)
    return UnitRequest(checking=TargetOptions(str(path), threads=1), timeout_seconds=timeout_seconds, **more)


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """All good and bad models in one run, each fault beside a good one."""
    folder = tmp_path_factory.mktemp("suite")
    bodies = {**{name: fault[0] for name, fault in FAULTS.items()}, **GOOD}
    requests = [
        request(folder / f"{index}.py", body, timeout_seconds=12 if "hang" in name else 60)
        for index, (name, body) in enumerate(bodies.items())
    ]
    ended = []
    units = run_units(requests, jobs=2, on_result=lambda request, unit: ended.append(unit))
    assert [unit.target for unit in units] == [each.checking.target for each in requests]
    assert sorted(unit.target for unit in ended) == sorted(unit.target for unit in units)
    return dict(zip(bodies, units, strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_finding_of_its_own_unit(units, name):
    _, status, code, reason = FAULTS[name]
    unit = units[name]
    assert (unit.status, unit.verdict, unit.reason) == (status, "inconclusive", reason)
    assert [(finding.code, finding.message) for finding in unit.findings] == [(code, f"{reason}.")]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_model_among_them_passes(units, name):
    assert (units[name].verdict, units[name].status, units[name].reason) == ("pass", "complete", None)
    assert len(units[name].tensors) == 3


@pytest.mark.parametrize("name", ["segfault", "abort", "exit", "hang"])
def test_the_line_of_the_fault_is_named(units, name):
    assert units[name].findings[0].location == Location(file=units[name].target, line=LINE)


def test_the_last_words_of_a_crash_are_its_details(units):
    assert units["segfault"].details.startswith("Fatal Python error: Segmentation fault\n")
    assert "Extension modules" not in units["segfault"].details


def test_death_by_signal_9_points_to_memory(units):
    assert units["kill"].findings[0].hint == (
        "on Linux this is most often the kernel, out of memory: see gradctl explain GC803."
    )


def test_sys_exit_says_what_it_does_in_one_process(tmp_path):
    (unit,) = run_units([request(tmp_path / "net.py", "sys.exit(0)")])
    assert (unit.status, unit.verdict, unit.findings[0].code) == ("error", "inconclusive", "GC111")
    assert "SystemExit: 0" in unit.findings[0].message


def test_a_mistake_in_the_request_is_the_finding_of_its_unit(tmp_path):
    bad = UnitRequest(checking=TargetOptions(str(tmp_path / "none.py")))
    unit, good = run_units([bad, request(tmp_path / "net.py")])
    assert (unit.status, unit.verdict, unit.findings[0].code) == ("error", "inconclusive", "GC101")
    assert good.verdict == "pass"


def test_nothing_to_check_is_skipped(tmp_path):
    (unit,) = run_units([request(tmp_path / "net.py", "return x.detach().long()")])
    assert (unit.status, unit.verdict, unit.findings[0].code) == ("unsupported", "skipped", "GC110")


def test_a_model_beyond_its_memory_limit_is_out_of_memory(tmp_path):
    gigabytes = 1 << 30
    bad = request(tmp_path / "large.py", "bytearray(16 << 30)", memory_limit_bytes=8 * gigabytes)
    tensor = request(tmp_path / "tensor.py", "torch.empty(4 << 30)", memory_limit_bytes=8 * gigabytes)
    good = request(tmp_path / "small.py", memory_limit_bytes=8 * gigabytes)
    units = run_units([bad, tensor, good])
    assert [unit.verdict for unit in units] == ["inconclusive", "inconclusive", "pass"]
    for unit in units[:2]:
        assert unit.findings[0].code == "GC803", unit
        assert unit.reason.startswith("out of memory: ")


def test_the_output_that_is_kept_is_bounded(tmp_path):
    (unit,) = run_units([request(tmp_path / "net.py", "for _ in range(100_000): print('y' * 79)\nos.abort()")])
    assert unit.details.startswith("…\n")
    assert len(unit.details) <= 16 * 1024
    assert "y" * 79 in unit.details


def test_nothing_that_a_unit_prints_reaches_our_streams(tmp_path, capfd):
    run_units([request(tmp_path / "net.py", "print('out'); print('err', file=sys.stderr); os.write(1, b'low')")])
    assert capfd.readouterr() == ("", "")


def test_an_answer_without_the_nonce_is_none(tmp_path):
    answer = '{"nonce": "0", "unit": {"target": "net.py", "form": "eager", "verdict": "pass"}}'
    forge = f"Path(sys.orig_argv[-1], 'answer.json').write_text({answer!r})\nos.kill(os.getpid(), signal.SIGKILL)"
    (unit,) = run_units([request(tmp_path / "net.py", forge)])
    assert (unit.status, unit.verdict) == ("crashed", "inconclusive")


def test_an_answer_counts_only_whole_and_with_its_nonce(tmp_path):
    path, unit = tmp_path / "answer.json", Unit(target="net.py", form="eager", verdict="pass")
    write_message(path, {"nonce": "right", "unit": unit})
    assert read_answer(path, "right") == unit
    assert read_answer(path, "wrong") is None
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_answer(path, "right") is None
    for garbage in (b"\xff\xfe", b"[" * 100_000, b"{}", whole + b"x"):
        path.write_bytes(garbage)
        assert read_answer(path, "right") is None
    path.unlink()
    assert read_answer(path, "right") is None


def test_an_allow_and_a_level_reach_the_check(tmp_path):
    cut = "x = super().forward(x); return x + (x - x.detach()) * 0"
    accepted = request(tmp_path / "net.py", cut, fail_on="note")
    (unit,) = run_units([accepted])
    assert unit.verdict == "fail"
    assert {finding.code for finding in unit.findings} == {"GC404"}


def test_what_breaks_in_the_callback_ends_the_run(tmp_path):
    def broken(request: UnitRequest, unit: Unit) -> None:
        raise BrokenPipeError(unit.target)

    hanging = request(tmp_path / "hang.py", "threading.Event().wait()", timeout_seconds=600)
    with pytest.raises(BrokenPipeError, match=r"net\.py"):
        run_units([request(tmp_path / "net.py"), hanging], jobs=2, on_result=broken)


def test_what_a_unit_has_started_ends_with_it(tmp_path):
    child = f"child = subprocess.Popen(['sleep', '600']); Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))"
    (unit,) = run_units([request(tmp_path / "net.py", child)])
    assert unit.verdict == "pass"
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_daemon_of_a_unit_ends_with_it(tmp_path):
    said = f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    daemon = f"if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        {said}\n        time.sleep(600)"
    (unit,) = run_units([request(tmp_path / "net.py", f"{daemon}\n    os._exit(0)\nos.wait()")])
    assert unit.verdict == "pass"
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_unit_that_clears_the_temporary_folder_loses_no_other(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    clears = f"import shutil; shutil.rmtree({str(tmp_path / 'shared')!r}, ignore_errors=True)"
    requests = [request(tmp_path / "clears.py", clears), request(tmp_path / "good.py")]
    assert [unit.verdict for unit in run_units(requests)] == ["pass", "pass"]


def test_a_disk_that_is_full_is_the_finding_of_its_unit(tmp_path, monkeypatch):
    def full(path, message):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradctl.isolation.unit_process.write_message", full)
    (unit,) = run_units([request(tmp_path / "good.py")])
    assert (unit.status, unit.reason) == (
        "error",
        "the process of the unit could not be started: No space left on device",
    )


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "GeneratorExit"])
def test_an_interrupt_of_the_model_s_own_is_not_ours(kind, tmp_path):
    (unit,) = run_units([request(tmp_path / "net.py", f"raise {kind}('enough')")])
    assert (unit.status, unit.reason) == ("crashed", f"the program that is checked raised {kind}: enough")


def test_a_model_that_raises_in_a_later_call_is_not_ours(tmp_path):
    raises = "Net.calls = getattr(Net, 'calls', 0) + 1\nif Net.calls == 2:\n    raise OSError('no more')"
    (unit,) = run_units([request(tmp_path / "net.py", raises)])
    assert (unit.status, unit.findings[0].code) == ("error", "GC111")
    assert unit.reason == f"{tmp_path / 'net.py'} raises in a call after the first: OSError: no more"
    assert unit.findings[0].location == Location(file=str(tmp_path / "net.py"), line=LINE + 2)


@pytest.mark.parametrize("mebibytes", [200, 400, 600])
def test_too_little_memory_for_torch_itself_is_out_of_memory(mebibytes, tmp_path):
    (unit,) = run_units([request(tmp_path / "net.py", memory_limit_bytes=mebibytes << 20)])
    assert (unit.verdict, unit.findings[0].code) == ("inconclusive", "GC803")


# The supervisor of two units: one passes, then one hangs, after it has said its process id.
SUPERVISOR = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gradctl.isolation.units import Interrupted, UnitRequest, run_units
from gradctl.core.target_options import TargetOptions
try:
    run_units([UnitRequest(checking=TargetOptions(target, threads=1)) for target in sys.argv[1:]])
except Interrupted as interrupted:
    print([unit and unit.verdict for unit in interrupted.units])
    sys.exit(130)
"""


@pytest.fixture
def supervised(tmp_path):
    """A supervisor whose second unit hangs, and the process id of that unit."""
    os.mkfifo(tmp_path / "pid")
    request(tmp_path / "good.py")
    said = f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    request(tmp_path / "hang.py", f"{said}\nthreading.Event().wait()")
    request(tmp_path / "never.py")
    targets = [str(tmp_path / name) for name in ("good.py", "hang.py", "never.py")]
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, *targets], stdout=subprocess.PIPE, text=True)
    with process:
        yield process, int((tmp_path / "pid").read_text())
        process.kill()


def test_a_supervisor_that_is_killed_leaves_no_orphan(supervised):
    process, unit = supervised
    assert Path(f"/proc/{unit}").exists()
    process.kill()
    assert is_gone(unit)


def test_an_interrupt_ends_the_units_and_keeps_what_is_complete(supervised):
    process, unit = supervised
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "['pass', None, None]\n"
    assert process.returncode == 130
    assert is_gone(unit)


def test_a_request_survives_its_way_to_the_process(tmp_path):
    checking = TargetOptions("net.py", ("a=1",), ("x=f32[2]",), Path("i.npz"), Path("w.pt"), False, "loss", 7)
    request = UnitRequest(checking=checking, form="export", allows=("GC404",), named=True, memory_limit_bytes=1)
    assignment = Assignment(request=request, nonce="n", supervisor=1)
    write_message(tmp_path / "assignment.json", assignment)
    assert read_message(tmp_path / "assignment.json", Assignment) == assignment
    assert [path.name for path in tmp_path.iterdir()] == ["assignment.json"]
