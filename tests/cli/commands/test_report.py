"""``gradctl report``: a stored report is rendered as the run rendered it, with the run's exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gradctl.cli.main import run
from gradctl.core.names import FORMATS
from gradctl.report.formats import render
from tests.cli.command_line import gradctl
from tests.report import examples

ROUNDS = {
    "pass": (examples.passing(), 0),
    "fail": (examples.wrong_weight(), 1),
    "inconclusive": (examples.crashed(), 4),
    "nothing checked": (examples.report_of(examples.unit("skipped")), 5),
    "interrupted": (examples.report_of(examples.unit("pass"), status="interrupted"), 130),
}


def stored(folder, report):
    path = folder / "run.json"
    path.write_text(render(report, "json"), encoding="utf-8")
    return path


@pytest.mark.parametrize(("report", "exit_code"), ROUNDS.values(), ids=ROUNDS)
def test_the_exit_code_is_that_of_the_run(tmp_path, capfd, report, exit_code):
    assert run(["report", str(stored(tmp_path, report))]) == exit_code
    assert capfd.readouterr() == (render(report, "console"), "")


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_is_what_the_run_itself_gave(tmp_path, capfd, monkeypatch, format_name):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert run(["report", str(stored(tmp_path, examples.wrong_weight())), "--format", format_name]) == 1
    assert capfd.readouterr().out == render(examples.wrong_weight(), format_name)


def test_more_files_are_written_at_once(tmp_path, capfd):
    path, xml, page = stored(tmp_path, examples.spoiled()), tmp_path / "a.xml", tmp_path / "a.md"
    assert run(["report", str(path), "--report", f"junit={xml}", "--report", f"markdown={page}"]) == 1
    assert xml.read_text(encoding="utf-8") == render(examples.spoiled(), "junit")
    assert page.read_text(encoding="utf-8") == render(examples.spoiled(), "markdown")


def test_a_report_of_a_real_run_is_read_from_standard_input_without_torch():
    checked = gradctl("gradcheck", "sample_models/wrong_backward.py", "--format", "json")
    script = (
        "import sys; from gradctl.cli.main import run; code = run(['report', '-', '--format', 'json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    rendered = subprocess.run(
        [sys.executable, "-c", script], input=checked.stdout, capture_output=True, text=True, check=False
    )
    assert (rendered.returncode, rendered.stdout, rendered.stderr) == (1, checked.stdout, "")


def refused(capfd, *arguments):
    assert run(["report", *map(str, arguments)]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    return said.err


def test_a_file_that_is_missing_is_named(tmp_path, capfd):
    assert refused(capfd, tmp_path / "run.json") == (
        f"GC132 '{tmp_path}/run.json' cannot be read: no such file or directory. "
        "FILE is a report written by --report json=FILE.\n"
    )


def test_a_folder_is_no_report(tmp_path, capfd):
    assert refused(capfd, tmp_path) == (
        f"GC132 '{tmp_path}' cannot be read: is a directory. FILE is a report written by --report json=FILE.\n"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_of_somebody_else_is_named(tmp_path, capfd):
    path = stored(tmp_path, examples.passing())
    path.chmod(0)
    assert "cannot be read: permission denied. Give a report" in refused(capfd, path)


def test_a_name_that_no_file_can_have_is_an_error_of_the_name(capfd):
    assert refused(capfd, "a\0b").startswith("GC132 'a\\x00b' cannot be read: embedded null byte. ")


def test_another_format_is_refused_with_file_and_reason(tmp_path, capfd):
    path = tmp_path / "run.xml"
    path.write_text(render(examples.passing(), "junit"), encoding="utf-8")
    assert refused(capfd, path) == (
        f"GC132 '{path}' is not a report of gradctl: JSON is malformed: invalid character (byte 0). "
        "Write it anew with --report json=FILE.\n"
    )


def test_the_report_of_a_run_that_was_cut_off_is_refused(tmp_path, capfd):
    path = stored(tmp_path, examples.wrong_weight())
    path.write_bytes(path.read_bytes()[:300])
    assert f"GC132 '{path}' is not a report of gradctl: input data was truncated. Write it anew" in refused(capfd, path)


def test_empty_standard_input_is_called_by_its_name():
    finished = subprocess.run(
        [sys.executable, "-m", "gradctl", "report", "-"], input=b"", capture_output=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(b"GC132 standard input is not a report of gradctl: input data was truncated.")


@pytest.mark.parametrize("option", [["--allow", "GC408"], ["--fail-on", "note"]])
def test_what_would_judge_anew_is_no_option(tmp_path, capfd, option):
    assert f"No such option '{option[0]}'" in refused(capfd, stored(tmp_path, examples.passing()), *option)
