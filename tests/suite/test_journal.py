"""The journal of a run: what has ended is not run again, whenever the run died."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradctl.core.errors import GradctlError, ResourceError
from gradctl.core.findings import Unit
from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import UnitRequest
from gradctl.suite.configuration import Configuration, Project
from gradctl.suite.journal import open_journal
from tests.cli.command_line import gradctl

REQUESTS = [UnitRequest(checking=TargetOptions("model.py"), form=form) for form in ("eager", "export", "onnx")]
UNITS = [Unit(target="model.py", form=each.form, verdict="pass") for each in REQUESTS]


@pytest.fixture
def opened(tmp_path):
    """Open the journal of three units in a folder with a configuration."""
    (tmp_path / "gradctl.toml").touch()
    project = Project(tmp_path / "gradctl.toml", Configuration())

    def opened(*, resumes=True, requests=REQUESTS):
        return open_journal(tmp_path / "journal", project, requests, resumes=resumes)

    return opened


def ended(opened):
    with opened() as journal:
        return [journal.unit_of(each) for each in REQUESTS], journal.running


@pytest.mark.fast
def test_what_ended_is_known_and_what_was_running_is_named(opened):
    with opened(resumes=False) as journal:
        for number in (0, 1):
            journal.started(REQUESTS[number])
        journal.has_ended(REQUESTS[1], UNITS[1])
    assert ended(opened) == ([None, UNITS[1], None], ("model.py eager",))


@pytest.mark.fast
def test_a_line_that_is_torn_anywhere_is_dropped_and_the_journal_goes_on(opened, tmp_path):
    with opened(resumes=False) as journal:
        journal.has_ended(REQUESTS[0], UNITS[0])
        kept = (tmp_path / "journal").stat().st_size
        journal.has_ended(REQUESTS[1], UNITS[1])
    whole = (tmp_path / "journal").read_bytes()
    for length in range(0, len(whole), 13):
        (tmp_path / "journal").write_bytes(whole[:length])
        with opened() as journal:
            assert (journal.unit_of(REQUESTS[0]) is not None) == (length >= kept)
            assert journal.unit_of(REQUESTS[1]) is None
            journal.has_ended(REQUESTS[2], UNITS[2])
        assert ended(opened)[0][1:] == [None, UNITS[2]]


@pytest.mark.fast
def test_a_run_without_resume_begins_anew(opened):
    with opened(resumes=False) as journal:
        journal.has_ended(REQUESTS[0], UNITS[0])
    with opened(resumes=False):
        pass
    assert ended(opened)[0] == [None, None, None]


@pytest.mark.fast
def test_a_journal_of_another_configuration_or_of_other_code_is_refused(opened, tmp_path):
    (tmp_path / "model.py").write_text("a = 1")
    with opened(resumes=False):
        pass
    with pytest.raises(GradctlError, match="GC154 .* is of another configuration"), opened(requests=REQUESTS[:2]):
        pass
    (tmp_path / "model.py").write_text("a = 2")
    with pytest.raises(GradctlError, match=r"GC154 .* is of other code: .*model\.py changed since"), opened():
        pass


@pytest.mark.fast
def test_a_file_that_is_no_journal_is_never_replaced(opened, tmp_path):
    for content in ("my notes\n", '{"type":"run","journal":2}\n', "{}"):
        (tmp_path / "journal").write_text(content)
        with pytest.raises(GradctlError, match="GC154 .* is not a journal of gradctl"), opened(resumes=False):
            pass
        assert (tmp_path / "journal").read_text() == content


@pytest.mark.fast
@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_two_runs_never_write_one_journal(opened):
    with opened(), pytest.raises(GradctlError, match="GC154 another run is writing"), opened():
        pass


@pytest.mark.fast
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_ends_the_run_with_one_sentence(opened):
    with opened() as journal:
        os.dup2(os.open("/dev/full", os.O_WRONLY), journal._file.fileno())
        with pytest.raises(ResourceError, match="GC131 the journal .* cannot be written: No space left on device"):
            journal.started(REQUESTS[0])


# Ten units: of a file that is missing, which ends at once, without torch.
CONFIGURATION = "".join(
    f'[[targets]]\ntarget = "missing.py"\nname = "{n}"\nforms = ["eager"]\nseed = {n}\n' for n in range(10)
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("seed", range(50))
def test_a_supervisor_that_is_killed_at_any_moment_loses_nothing(tmp_path, seed):
    (tmp_path / "gradctl.toml").write_text(CONFIGURATION)
    command = ["check", "--jobs", "2", "--report", "json=report.json"]
    moment = random.Random(seed).uniform(0.2, 2.5)
    process = subprocess.Popen(
        [sys.executable, "-m", "gradctl", *command], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(moment)
    process.kill()
    process.wait()
    journal = tmp_path / "report.json.journal"
    before = _ended(journal)
    finished = gradctl(*command, "--resume", cwd=tmp_path)
    assert finished.returncode == 4, finished.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [unit["target"] for unit in report["units"]] == [f"missing.py[{n}]" for n in range(10)]
    again = finished.stderr.count("missing.py, eager: inconclusive")
    assert again == 10 - len(before)
    assert not journal.exists()
    assert not list(tmp_path.glob("*.part"))


def _ended(journal):
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return {json.loads(line)["key"] for line in lines if line.endswith(b"\n") and b'"type":"end"' in line[:20]}


@pytest.mark.fast
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_or_a_device_is_not_read_as_a_journal(opened, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        (tmp_path / "journal").symlink_to(endless)
        with pytest.raises(GradctlError, match="GC154 .* is not a journal of gradctl"), opened():
            pass
        (tmp_path / "journal").unlink()
