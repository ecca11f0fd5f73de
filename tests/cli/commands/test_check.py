"""``gradctl check`` as a process: exit codes, both streams, what is written, and what is left when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import junitparser
import pytest

from gradctl.report.machine.json import load
from tests.cli.command_line import gradctl
from tests.isolation.faulty import is_gone, written

SAMPLES = Path(__file__).parents[3] / "sample_models"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc")


def check(folder, *arguments, **environment):
    return gradctl("check", *arguments, cwd=folder, OMP_NUM_THREADS="1", **environment)


def units(finished):
    return {(unit["target"], unit["form"]): unit for unit in json.loads(finished.stdout)["units"]}


@pytest.fixture
def wrong(tmp_path):
    """A model whose custom backward is off by a factor of eight."""
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(SAMPLES / "wrong_backward.py", folder)
    return tmp_path


def worsened(folder, old, new):
    path = folder / "models" / "wrong_backward.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


@pytest.mark.slow
def test_what_fails_is_accepted_until_it_gets_worse(wrong):
    run = ("models", "--form", "eager", "--form", "export")
    finished = check(wrong, *run, "--write-allows")
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "PASS: 2 of 2 forms agree")
    assert f"{wrong / 'gradctl.toml'}: 2 written to 'allow', 0 removed" in finished.stderr

    worsened(wrong, ".mean(0)", ".mean(0) / 2")
    finished = check(wrong, *run, "--format", "json")
    assert finished.returncode == 1
    failed = {key: unit for key, unit in units(finished).items() if unit["verdict"] == "fail"}
    assert set(failed) == {("models/wrong_backward.py", "eager"), ("models/wrong_backward.py", "export")}
    assert "and accepted is 8.75e-01" in failed["models/wrong_backward.py", "eager"]["findings"][0]["message"]


@pytest.mark.slow
def test_another_input_of_an_accepted_function_is_worse(wrong):
    assert check(wrong, "models", "--form", "eager", "--write-allows").returncode == 0
    worsened(wrong, "gradient * torch.where(x > 0, 1.0, slope)", "gradient * torch.where(x > 0, 1.1, slope)")
    assert check(wrong, "models", "--form", "eager").returncode == 1


@pytest.mark.slow
def test_an_entry_that_is_of_no_use_is_reported_and_removed(wrong):
    assert check(wrong, "models", "--form", "eager", "--write-allows").returncode == 0
    worsened(wrong, ".mean(0)", ".sum(0)")
    finished = check(wrong, "models", "--form", "eager")
    assert finished.returncode == 0
    assert "note GC150 allow GC408:LeakyReLU accepted nothing in this run." in " ".join(finished.stdout.split())
    finished = check(wrong, "models", "--form", "eager", "--write-allows")
    assert (finished.returncode, "0 written to 'allow', 1 removed" in finished.stderr) == (0, True)
    assert "GC408" not in (wrong / "gradctl.toml").read_text()


def test_a_run_of_one_form_removes_nothing_that_another_needs(wrong):
    config = wrong / "gradctl.toml"
    config.write_bytes(b'forms = ["eager", "trace"]\r\n\r\n[[allow]]\r\nfinding = "GC408"\r\n')
    before = config.read_bytes()
    finished = check(wrong, "--form", "trace", "--write-allows", "--format", "json")
    assert (finished.returncode, config.read_bytes()) == (0, before)
    assert not [finding for unit in units(finished).values() for finding in unit["findings"]]


@pytest.mark.slow
def test_what_is_inconclusive_is_accepted_by_expect_and_not_by_allow(tmp_path):
    written(tmp_path / "net.py", "os.abort()")
    config = tmp_path / "gradctl.toml"
    config.write_text('[[targets]]\ntarget = "net.py"\nforms = ["eager"]\n')
    finished = check(tmp_path, "--write-allows")
    assert (finished.returncode, finished.stderr.splitlines()[-2:]) == (
        4,
        [
            f"{config}: 0 written to 'allow', 0 removed",
            "net.py is inconclusive, which 'allow' does not accept. If this is expected, add to its [[targets]] entry: "
            'expect = {eager = "inconclusive"}',
        ],
    )
    config.write_text(config.read_text() + 'expect = {eager = "inconclusive"}\n')
    assert check(tmp_path).returncode == 0


def test_a_configuration_that_cannot_be_written_is_said_before_the_run(wrong):
    (wrong / "gradctl.toml").mkdir()
    finished = check(wrong, "--write-allows", "--form", "eager")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "gradctl.toml' cannot be written: it is a folder" in finished.stderr


@pytest.mark.slow
def test_what_is_expected_to_fail_passes_while_it_fails(wrong):
    (wrong / "gradctl.toml").write_text(
        '[[targets]]\ntarget = "models/wrong_backward.py"\nforms = ["eager"]\nexpect = {eager = "fail"}\n'
    )
    assert check(wrong).returncode == 0
    worsened(wrong, ".mean(0)", ".sum(0)")
    finished = check(wrong)
    assert (finished.returncode, finished.stdout.count("error GC152 eager is expected to have failed")) == (1, 1)


def test_a_model_that_segfaults_among_three_others(tmp_path):
    for index in range(3):
        written(tmp_path / f"good{index}.py", "print('{}')")
    written(tmp_path / "bad.py", "ctypes.string_at(0)")
    finished = check(tmp_path, ".", "--form", "eager", "--format", "json", "--report", f"junit={tmp_path / 'r.xml'}")
    assert finished.returncode == 4
    found = units(finished)
    assert sorted(unit["verdict"] for unit in found.values()) == ["inconclusive", *["pass"] * 3]
    crashed = found["bad.py", "eager"]
    assert (crashed["status"], crashed["findings"][0]["code"]) == ("crashed", "GC801")
    cases = [case for suite in junitparser.JUnitXml.fromfile(str(tmp_path / "r.xml")) for case in suite]
    assert len(cases) == 4
    assert [type(result).__name__ for case in cases for result in case.result] == ["Error"]


def test_the_configuration_says_what_runs_and_how(tmp_path):
    written(tmp_path / "net.py")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.gradctl]\nforms = ["eager", "trace"]\n'
        '[[tool.gradctl.targets]]\ntarget = "net.py"\n'
        '[[tool.gradctl.targets]]\ntarget = "net.py"\nname = "long"\ninput = ["f32[9,3]"]\nforms = ["eager"]\n'
        'allow = ["GC408:Round"]\nexpect = {eager = "pass"}\n'
    )
    finished = check(tmp_path, "--list")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines() == [
        "net.py        eager",
        "net.py        trace",
        "net.py[long]  eager    expect pass; allow GC408:Round",
    ]
    finished = check(tmp_path, "-k", "long", "--format", "json")
    (unit,) = units(finished).values()
    assert (finished.returncode, unit["target"]) == (0, "net.py[long]")
    assert [tensor["shape"] for tensor in unit["tensors"] if tensor["tensor"].startswith("input:")] == [[9, 3]]


def test_the_sizes_of_a_target_are_checked_in_each_form(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Wrong(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return 2 * x\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return (2 if len(g) < 4 else 3) * g\n"
        "def net(x): return Wrong.apply(x)\n"
        "def net_inputs(batch=2): return torch.randn(batch, 3)\n"
    )
    (tmp_path / "gradctl.toml").write_text(
        'forms = ["eager", "trace"]\n[[targets]]\ntarget = "net.py:net"\nsizes = "batch=1,3,4,7"\nmax-sizes = 3\n'
    )
    finished = gradctl("check", "--format", "json", cwd=tmp_path)
    units = {unit["form"]: unit for unit in json.loads(finished.stdout)["units"]}
    assert finished.returncode == 1
    assert units["eager"]["verdict"] == "fail"
    assert {"batch=1", "batch=7"} < set(units["eager"]["variations"])
    assert sum("," not in name for name in units["eager"]["variations"]) == 3
    assert units["trace"]["verdict"] == "pass"
    assert {"example", "batch=1", "batch=7"} < set(units["trace"]["variations"])


def test_discovery_needs_no_configuration(tmp_path):
    written(tmp_path / "net.py")
    finished = check(tmp_path, "--form", "eager")
    assert finished.returncode == 0
    quiet = check(tmp_path, "--form", "eager", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, finished.stdout.splitlines(keepends=True)[-1], "")
    assert re.fullmatch(r"net\.py, eager: pass, \d+\.\d s; 1 of 1 units, \d:\d\d\n", finished.stderr)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("none.py",), 2, "GC101 'none.py' does not exist. Give a folder, a file, or a target: FILE.py:NAME."),
        (("nofolder",), 2, "GC101 'nofolder' does not exist. Give a folder, a file, or a target: FILE.py:NAME."),
        (("n" * 300 + ".py",), 2, "nnn.py' cannot be looked up: File name too long."),
        (("-k", "zzz"), 5, "GC110 no unit matches -k and --form. See 'gradctl check --list' for the units."),
        (("--form", "eager", "-k", "trace"), 5, "GC110 no unit matches -k and --form."),
        (("--memory", "lots"), 2, "'lots' is not a size. Write, for example, 8GiB or 500MB."),
        (("--config", "none.toml"), 2, "GC153 none.toml cannot be read: No such file or directory."),
        (("empty",), 5, "GC110 no Python file in empty has a make_model."),
    ],
)
def test_what_cannot_be_run_is_one_sentence(arguments, exit_code, said, tmp_path):
    written(tmp_path / "net.py")
    (tmp_path / "empty").mkdir()
    finished = check(tmp_path, *arguments)
    assert (finished.returncode, finished.stdout) == (exit_code, "")
    assert said in finished.stderr and "Traceback" not in finished.stderr


def test_a_mistake_in_the_configuration_has_its_line(tmp_path):
    (tmp_path / "gradctl.toml").write_text('[[targets]]\ntarget = "net.py"\nfroms = ["eager"]\n')
    finished = check(tmp_path)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "gradctl.toml, line 3: unknown key 'froms' in targets (did you mean 'forms'?)." in finished.stderr


@contextlib.contextmanager
def stopped(tmp_path, *signals):
    """Start a run whose second unit hangs, send signals once it does, and give the run and that unit's process id.

    The unit has a child by then, of which the process id is in ``child``. Temporary files go to ``temporary``.
    """
    os.mkfifo(tmp_path / "pid")
    said = f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); "
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child = f"child = os.popen('sleep 600 & echo $!'); Path({str(tmp_path / 'child')!r}).write_text(child.readline()); "
    (tmp_path / "temporary").mkdir()
    written(tmp_path / "a.py")
    written(tmp_path / "b.py", f"{deaf}{child}{said}threading.Event().wait()")
    written(tmp_path / "c.py")
    line = [sys.executable, "-m", "gradctl", "check", ".", "--form", "eager", "--jobs", "1", "--report", "json=r.json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        line,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A suite that a script runs in its background ignores SIGINT, and what it starts would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one call of the system
    ) as process:
        try:
            unit = int((tmp_path / "pid").read_text())
            for each in signals:
                process.send_signal(each)
            yield process, unit
        finally:
            process.kill()


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_reports_what_is_complete(sent, exit_code, tmp_path):
    with stopped(tmp_path, sent) as (process, unit):
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == exit_code
        assert is_gone(unit)
    report = load((tmp_path / "r.json").read_bytes())
    assert (report.status, report.verdict, [each.target for each in report.units]) == (
        "interrupted", "inconclusive", ["a.py"],
    )  # fmt: skip
    assert report.planned == 3
    assert printed.splitlines()[-1] == "INTERRUPTED: 1 of 3 units done, it passes"


def test_a_second_interrupt_does_not_wait(tmp_path):
    with stopped(tmp_path, signal.SIGINT) as (process, unit):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert is_gone(unit)


def test_a_run_that_is_killed_leaves_no_process_and_no_torn_report(tmp_path):
    (tmp_path / "r.json").write_text("the last report")
    with stopped(tmp_path, signal.SIGKILL) as (process, unit):
        process.wait(timeout=60)
        assert is_gone(unit)
        assert is_gone(int((tmp_path / "child").read_text()))
    for _ in range(200):
        if not list((tmp_path / "temporary").glob("gradctl-*")):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the folder of the run is left")
    assert (tmp_path / "r.json").read_text() == "the last report"


def test_snapshots_are_missing_then_written_and_a_file_without_a_target_is_noted(tmp_path):
    shutil.copy(SAMPLES / "linear.py", tmp_path)
    run = ("--snapshot", "kept", "--form", "snapshot")
    missing = check(tmp_path, *run)
    assert missing.returncode == 5
    said = " ".join(missing.stdout.split())
    line = "gradctl check --snapshot kept --form snapshot --update"
    assert f"NOTHING CHECKED: kept has no snapshot of this target. Write it: {line}" in said
    assert "snapshot" in check(tmp_path, "--snapshot", "kept", "--list").stdout.splitlines()[-1]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old.py.snapshot").touch()
    written = check(tmp_path, *run, "--update", "--format", "json")
    assert written.returncode == 0
    notes = [finding["message"] for finding in units(written)["linear.py", "snapshot"]["findings"]]
    expected = [
        "kept/linear.py.snapshot was written.",
        "old.py.snapshot in kept belongs to no target of the configuration.",
    ]
    assert notes == expected
    assert (tmp_path / "kept" / "linear.py.snapshot").is_file()


@pytest.mark.parametrize("options", [("--update",), ("--form", "snapshot")])
def test_what_needs_a_folder_of_snapshots_says_so(tmp_path, options):
    shutil.copy(SAMPLES / "linear.py", tmp_path)
    refused = check(tmp_path, *options)
    assert refused.returncode == 2
    said = f"needs a folder of snapshots: add --snapshot DIR, or 'snapshots' to {tmp_path}/gradctl.toml."
    assert said in " ".join(refused.stderr.split())
