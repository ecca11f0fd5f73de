"""What the supervisor of mutated files is there to see, it sees: crashes, hangs, tracebacks, memory, files written."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz.supervisor import Answer, Supervisor, faults, snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and address-space limits")

MODEL = """
import os, signal
from pathlib import Path
import torch


def make_model():
    {body}
    return torch.nn.Linear(2, 2)


def example_inputs():
    return (torch.ones(1, 2),)
"""


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory):
    found = Supervisor(tmp_path_factory.mktemp("supervisor"), 20)
    yield found
    found.close()


def answer_to(supervisor, folder, body):
    (folder / "net.py").write_text(MODEL.format(body=body))
    return supervisor.run(["gradcheck", str(folder / "net.py")])


def test_a_good_command_has_no_faults_and_the_worker_stays(supervisor, tmp_path):
    assert [answer_to(supervisor, tmp_path, "pass").code for _ in range(2)] == [0, 0]
    assert supervisor.started == 1


def test_a_crash_is_a_fault_and_the_next_command_has_a_worker_again(supervisor, tmp_path):
    crashed = answer_to(supervisor, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert faults(crashed) == ["killed by SIGSEGV"]
    assert "Segmentation fault" in crashed.stderr
    left = answer_to(supervisor, tmp_path, "os.execv('/bin/true', ['true'])")
    assert faults(left) == ["the process exited with 0"]
    assert faults(answer_to(supervisor, tmp_path, "pass")) == []


def test_a_hang_is_a_fault(tmp_path):
    impatient = Supervisor(tmp_path, 2)
    try:
        assert faults(impatient.run(["explain", "GC101"])) == []
        assert faults(answer_to(impatient, tmp_path, "signal.pause()")) == ["no answer in 2 s"]
    finally:
        impatient.close()


def test_memory_beyond_the_limit_is_refused(supervisor, tmp_path):
    refused = answer_to(supervisor, tmp_path, "bytearray(2**31)")
    assert (refused.code, faults(refused)) == (4, [])
    assert "GC803 out of memory" in refused.stderr


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Answer(0, ""), []),
        (Answer(2, "GC142 model.onnx is empty. Write it again.\n"), []),
        (Answer(2, "Usage: …\n\nError: no command 'x'.\n"), []),
        (Answer(2, ""), ["no sentence with a code"]),
        (Answer(3, "Traceback (most recent call last):\n"), ["exit code 3", "a traceback"]),
        (Answer(1, "internal error of gradctl (KeyError)"), ["a traceback"]),
        (Answer(139, ""), ["exit code 139"]),
    ],
    ids=str,
)
def test_what_is_a_fault(answer, found):
    assert faults(answer) == found


def test_a_file_that_is_written_changed_or_removed_is_seen(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    for name in ("kept", "changed", "removed"):
        (tmp_path / name).write_text("before")
    before = snapshot(tmp_path, without=output)
    (tmp_path / "changed").write_text("after")
    (tmp_path / "removed").unlink()
    (tmp_path / "written").touch()
    (output / "result").touch()
    after = snapshot(tmp_path, without=output)
    assert {path.rpartition("/")[2] for path, _ in before.items() ^ after.items()} == {"changed", "removed", "written"}
