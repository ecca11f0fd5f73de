"""The options that every checking command shares, and giving the report out: files first, then standard output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gradctl.cli.reporting import ReportOptions, emit, progress_line, report_options
from gradctl.core.errors import ResourceError
from gradctl.report.formats import render
from tests.report import examples


@click.command("judge")
@report_options
def judge(reporting):
    click.echo(repr(reporting))


def options(*arguments):
    """Return what a command is given for ``arguments``."""
    given = []

    @click.command("judge")
    @report_options
    def judge(reporting):
        given.append(reporting)

    judge.main(list(arguments), standalone_mode=False)
    return given[0]


def test_the_defaults():
    assert options() == ReportOptions(format="console", files=(), allows=(), fail_on="error")


def test_everything_given(tmp_path):
    xml, text = tmp_path / "a.xml", tmp_path / "b=c.txt"
    given = options(
        "--format", "json", "--report", f"junit={xml}", "--report", f"console={text}",
        "--allow", "gc408:Round:x", "--allow", "GC404", "--fail-on", "note",
    )  # fmt: skip
    assert given == ReportOptions(
        "json", (("junit", xml), ("console", text)), allows=("GC408:Round:x", "GC404"), fail_on="note"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--report", "report.json"], "'report.json' is not FORMAT=FILE, for example junit=report.xml."),
        (["--report", "json="], "'json=' is not FORMAT=FILE, for example junit=report.xml."),
        (
            ["--report", "jnuit=a.xml"],
            "unknown format 'jnuit' (did you mean 'junit'?). Formats: console, json, jsonl, markdown, junit, github, ",
        ),
        (
            ["--report", "json=a", "--report", "junit=a"],
            "'a' is the file of two reports; write each to its own file.",
        ),
        (["--allow", "408"], "'408' is not CODE or CODE:NAME, for example GC408:RoundStraightThrough."),
        (["--allow", "GC408:"], "'GC408:' is not CODE or CODE:NAME, for example GC408:RoundStraightThrough."),
        (["--allow", "GC499"], "no rule 'GC499'"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_usage_error(arguments, says):
    with pytest.raises(click.UsageError) as raised:
        options(*arguments)
    assert raised.value.format_message().startswith(f"Invalid value for '{arguments[0]}': {says}")


def test_a_folder_that_is_missing_is_noticed_before_the_check_starts(tmp_path):
    with pytest.raises(ResourceError, match="there is no folder") as raised:
        options("--report", f"json={tmp_path}/missing/a.json")
    assert (raised.value.code, raised.value.exit_code) == ("GC131", 2)


def test_the_help_shows_the_options():
    text = CliRunner().invoke(judge, ["--help"]).output
    for option in ("--format FORMAT", "--report FORMAT=FILE", "--allow CODE[:NAME]", "--fail-on SEVERITY"):
        assert option in text


@pytest.mark.parametrize(
    ("report", "exit_code"),
    [
        (examples.passing(), 0),
        (examples.wrong_weight(), 1),
        (examples.crashed(), 4),
        (examples.report_of(examples.unit("skipped")), 5),
    ],
    ids=["pass", "fail", "inconclusive", "nothing checked"],
)
def test_the_exit_code_is_that_of_the_verdict(report, exit_code, capsysbinary):
    assert emit(report, ReportOptions(format="json")) == exit_code
    assert json.loads(capsysbinary.readouterr().out)["verdict"] == report.verdict


def test_files_and_standard_output_get_the_formats_they_were_given(tmp_path, capsysbinary):
    files = (("junit", tmp_path / "a.xml"), ("jsonl", tmp_path / "b.jsonl"))
    emit(examples.wrong_weight(), ReportOptions(format="markdown", files=files))
    for format_name, path in files:
        assert path.read_text(encoding="utf-8") == render(examples.wrong_weight(), format_name)
    assert capsysbinary.readouterr().out.decode() == render(examples.wrong_weight(), "markdown")


def test_a_piped_console_report_is_plain_and_80_columns(capsysbinary, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    emit(examples.wrong_weight(), ReportOptions())
    assert capsysbinary.readouterr().out.decode() == render(examples.wrong_weight(), "console")


EMITTING = """
import sys
from gradctl.cli.reporting import ReportOptions, emit
from tests.report import examples
sys.exit(emit(examples.{report}, ReportOptions(format={format!r})))
"""


def emitting(report, format_name="console", **popen):
    script = EMITTING.format(report=report, format=format_name)
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", script], cwd=root, stderr=subprocess.PIPE, check=False, **popen)


@pytest.mark.parametrize(("report", "exit_code"), [("wrong_weight()", 1), ("passing()", 0), ("crashed()", 4)])
def test_a_reader_that_leaves_early_leaves_the_verdict_its_exit_code(report, exit_code):
    read_end, write_end = os.pipe()
    os.close(read_end)
    finished = emitting(report, stdout=write_end)
    os.close(write_end)
    assert (finished.returncode, finished.stderr) == (exit_code, b"")


def test_json_is_utf8_whatever_the_terminal_speaks():
    report = "report_of(examples.unit('pass', target='modèle.py:β'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    finished = emitting(report, "json", stdout=subprocess.PIPE, env=environment)
    assert (finished.returncode, finished.stderr) == (0, b"")
    assert json.loads(finished.stdout.decode("utf-8"))["units"][0]["target"] == "modèle.py:β"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_standard_output_is_said():
    with Path("/dev/full").open("wb") as full:
        finished = emitting("passing()", stdout=full)
    assert (
        b"GC131 standard output cannot be written: No space left on device. Redirect it elsewhere." in finished.stderr
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("no_color", "colourful"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_it_asks_for_none(no_color, colourful):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    finished = emitting("wrong_weight()", stdout=theirs, env=environment)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert finished.returncode == 1
    assert ("\x1b[" in shown) is colourful
    assert "FAIL: 1 of 3 gradients is wrong" in shown


def test_the_page_of_a_step_on_github_is_appended_to(tmp_path, monkeypatch, capsysbinary):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    emit(examples.wrong_weight(), ReportOptions(format="github"))
    assert page.read_text() == "before\n" + render(examples.wrong_weight(), "markdown")


def test_a_step_page_that_cannot_be_written_changes_no_verdict(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "missing" / "summary.md"))
    assert emit(examples.passing(), ReportOptions(format="github")) == 0
    assert "cannot be written: No such file or directory" in capfd.readouterr().err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_overwrites_itself_and_is_gone_at_the_end():
    terminal = Terminal()
    with progress_line(terminal, after_seconds=0) as progress:
        progress("screen: 12 of 40 forwards")
        progress("done")
    assert terminal.getvalue() == "\rscreen: 12 of 40 forwards, 0:00" + "\rdone, 0:00" + " " * 21 + "\r          \r"


def test_a_line_of_progress_that_ends_in_a_newline_stays():
    terminal = Terminal()
    with progress_line(terminal, after_seconds=0) as progress:
        progress("comparing export")
        progress("export: pass\n")
        progress("comparing aot")
    lines = terminal.getvalue().split("\n")
    assert lines == ["\rcomparing export, 0:00\rexport: pass          ", "\rcomparing aot, 0:00\r" + " " * 19 + "\r"]


def test_the_elapsed_time_goes_on_and_is_never_cut_off(monkeypatch):
    now = iter([0.0, 0.5, 42.0, *[3723.0] * 100])
    ticked = threading.Event()
    monkeypatch.setattr("gradctl.cli.reporting.time.monotonic", lambda: next(now))
    terminal = Terminal()
    terminal.flush = ticked.set
    with progress_line(terminal) as progress:
        progress("0 of 8 units")
        assert terminal.getvalue() == ""
        assert ticked.wait(60)
        assert terminal.getvalue() == "\r0 of 8 units, 0:42"
        progress("n" * 200)
        assert terminal.getvalue().rpartition("\r")[2] == "n" * 70 + ", 1:02:03"


@pytest.mark.parametrize(
    ("stream", "after_seconds"), [(io.StringIO(), 0), (Terminal(), 60)], ids=["no terminal", "a quick check"]
)
def test_progress_is_silent(stream, after_seconds):
    with progress_line(stream, after_seconds=after_seconds) as progress:
        progress("screen")
    assert stream.getvalue() == ""


def test_quiet_prints_the_verdict_and_nothing_else(capsysbinary):
    assert emit(examples.wrong_weight(), ReportOptions(quiet=True), preface="net.onnx is written\n\n") == 1
    assert capsysbinary.readouterr().out.decode() == "FAIL: 1 of 3 gradients is wrong (gradctl explain GC401)\n"


def test_quiet_shows_no_progress():
    terminal = Terminal()
    with progress_line(terminal, after_seconds=0, is_shown=False) as progress:
        progress("screen")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("other", [["--verbose"], ["--format", "json"]])
def test_quiet_contradicts_what_would_print_more(other):
    with pytest.raises(click.UsageError) as raised:
        options("--quiet", *other)
    assert raised.value.message == (
        f"--quiet prints only the verdict, so it cannot be combined with {' '.join(other)}."
    )


def test_figures_are_written_beside_the_report(tmp_path, capsysbinary):
    pytest.importorskip("matplotlib")
    reporting = options("--plot", str(tmp_path / "figures"))
    assert emit(examples.wrong_weight(), reporting) == 1
    assert "1-eager-errors.png" in [file.name for file in (tmp_path / "figures").iterdir()]


def test_figures_without_matplotlib_are_refused_before_the_check_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("gradctl.report.plots.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        click.UsageError, match=r"--plot: matplotlib is not installed: pip install 'gradctl\[plots\]'\."
    ):
        options("--plot", str(tmp_path / "figures"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_figures_that_is_a_file_is_noticed_before_the_check_starts(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "figures").touch()
    with pytest.raises(ResourceError, match="GC131"):
        options("--plot", str(tmp_path / "figures"))
