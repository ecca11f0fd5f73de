"""The report of units: the source lines that its findings name."""

from __future__ import annotations

import pytest

from gradctl.core.assembly import assemble_report
from gradctl.core.findings import Finding, Location
from tests.report.examples import unit


def report_with(*locations):
    findings = [Finding(code="GC408", severity="error", message="wrong.", location=each) for each in locations]
    return assemble_report("gradcheck", [unit("fail", [], findings)], (), seed=0)


def test_the_lines_around_a_finding_are_in_the_report(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("".join(f"line {number}\n" for number in range(1, 31)), encoding="utf-8")
    place = Location(file=str(file), line=12)
    (excerpt,) = report_with(place, place).sources
    assert excerpt.lines[excerpt.line - excerpt.first_line] == "line 12"
    assert set(excerpt.lines) > {"line 10", "line 11", "line 13", "line 14"}
    assert len(excerpt.lines) == 10


@pytest.mark.parametrize(("line", "first"), [(1, "line 1"), (3, "line 1")])
def test_lines_at_the_ends_of_a_file_are_fewer(tmp_path, line, first):
    file = tmp_path / "net.py"
    file.write_text("line 1\nline 2\nline 3", encoding="utf-8")
    (excerpt,) = report_with(Location(file=str(file), line=line)).sources
    assert (excerpt.lines[0], excerpt.lines[-1]) == (first, "line 3")


@pytest.mark.parametrize(
    ("name", "line"),
    [("gone.py", 3), ("net.py", 0), ("net.py", 9), ("net.py", None), ("weights.bin", 1), ("folder.py", 1)],
)
def test_a_place_that_has_no_source_is_left_out(tmp_path, name, line):
    (tmp_path / "net.py").write_text("one\n", encoding="utf-8")
    (tmp_path / "weights.bin").write_bytes(b"\x00\n")
    (tmp_path / "folder.py").mkdir()
    assert report_with(Location(file=str(tmp_path / name), line=line)).sources == ()


def test_a_long_line_is_cut(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("x" * 10_000, encoding="utf-8")
    (excerpt,) = report_with(Location(file=str(file), line=1)).sources
    assert len(excerpt.lines[0]) == 200
