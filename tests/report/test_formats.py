"""The table of formats, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import stat

import pytest
from hypothesis import HealthCheck, given, settings

from gradctl.core.errors import ResourceError
from gradctl.core.names import FORMATS
from gradctl.report.formats import FORMATTERS, ensure_writable, render, write
from gradctl.report.machine.json import load
from tests.report import examples
from tests.report.any_report import reports


def test_the_table_has_every_format_that_the_options_list():
    assert tuple(FORMATTERS) == FORMATS


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_names_the_wrong_gradient_and_ends_in_a_newline(format_name):
    text = render(examples.wrong_weight(), format_name)
    assert "fc1.weight" in text
    assert text.endswith("\n")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_run_that_was_interrupted_never_reads_as_a_pass(format_name):
    units = [examples.unit("pass", [examples.gradient("a")], target=target) for target in ("a.py", "b.py")]
    assert "PASS: " in render(examples.report_of(*units), "console")
    text = render(examples.report_of(*units, status="interrupted"), format_name)
    assert re.search("interrupted", text, re.IGNORECASE)
    assert "PASS" not in text


@pytest.mark.parametrize("format_name", FORMATS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], derandomize=True, deadline=None)
@given(report=reports)
def test_any_stored_report_is_rendered_as_the_run_itself_would(format_name, report):
    assert render(load(render(report, "json").encode()), format_name) == render(report, format_name)


@pytest.mark.parametrize("format_name", sorted({*FORMATS} - {"github", "gitlab", "sarif"}))  # they have no pass
def test_a_unit_that_does_as_expected_is_named_with_what_was_expected(format_name):
    text = render(examples.whole_run(), format_name)
    assert "expected" in text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    write(path, "new é\n")
    assert path.read_bytes() == "new é\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    link = tmp_path / "latest.json"
    link.symlink_to(tmp_path / "report.json")
    write(link, "new\n")
    assert link.is_symlink()
    assert (tmp_path / "report.json").read_text() == "new\n"


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "report.json"
    path.touch(mode=0o600)
    write(path, "text")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_tried_is_left_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    ensure_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    ensure_writable(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("attempt", [ensure_writable, lambda path: write(path, "text")], ids=["tried", "written"])
def test_a_folder_that_is_missing_is_named(tmp_path, attempt):
    path = tmp_path / "missing" / "report.json"
    with pytest.raises(ResourceError) as raised:
        attempt(path)
    assert str(raised.value) == (
        f"GC131 {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}. Create it, or use another "
        "path."
    )
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("attempt", [ensure_writable, lambda path: write(path, "text")], ids=["tried", "written"])
def test_a_folder_is_no_file(tmp_path, attempt):
    with pytest.raises(ResourceError, match=r"cannot be written: .* Give a path that you may write to\.") as raised:
        attempt(tmp_path)
    assert raised.value.code == "GC131"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ensure_writable(pipe)
        write(pipe, "through\n")
        assert os.read(reader, 100) == b"through\n"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
