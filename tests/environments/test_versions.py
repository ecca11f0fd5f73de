from __future__ import annotations

import pytest

from gradctl.environments.versions import parse_range

LISTED = ["2.15.0", "2.14.1", "2.14.0", "2.13.0+cpu", "2.13.0", "2.9.1", "2.10.0", "2.12.1", "2.14.0rc1", "1.13.1"]


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("2.10..2.14", ["2.10.0", "2.12.1", "2.13.0", "2.14.0", "2.14.1"]),
        ("2.12.1..2.14.0", ["2.12.1", "2.13.0", "2.14.0"]),
        ("2.13..", ["2.13.0", "2.14.0", "2.14.1", "2.15.0"]),
        ("..2.9", ["1.13.1", "2.9.1"]),
        ("2..2", ["2.9.1", "2.10.0", "2.12.1", "2.13.0", "2.14.0", "2.14.1", "2.15.0"]),
        ("2.14..2.14", ["2.14.0", "2.14.1"]),
        ("3.0..4", []),
    ],
)
def test_a_range_has_its_releases_oldest_first(text, selected):
    assert parse_range(text).select(LISTED) == selected


def test_a_post_release_follows_its_release():
    assert parse_range("2..3").select(["2.1.0.post1", "2.1.1", "2.1.0"]) == ["2.1.0", "2.1.0.post1", "2.1.1"]


@pytest.mark.parametrize("text", ["2.10", "2.10-2.14", "a..b", "..", "", "2.10..2.14..2.15", "2.10...2.14", "2.x..3"])
def test_what_is_no_range_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is not a range of versions; write, for example, 2\.10\.\.2\.14"):
        parse_range(text)


def test_a_range_that_ends_before_it_begins_is_refused_with_its_right_order():
    with pytest.raises(ValueError, match=r"'2\.14\.\.2\.10' ends before it begins; write 2\.10\.\.2\.14"):
        parse_range("2.14..2.10")
