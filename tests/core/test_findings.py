"""Numbers, places and fingerprints of the report."""

from __future__ import annotations

import math

import pytest

from gradctl.core.findings import Location, fingerprint
from gradctl.core.numbers import format_number, number


@pytest.mark.parametrize(
    ("value", "stored"),
    [(None, None), (0.0, 0.0), (1.5, 1.5), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")],
)
def test_what_json_cannot_hold_is_stored_by_name(value, stored):
    assert number(value) == stored


@pytest.mark.parametrize(
    ("stored", "printed"),
    [
        (None, "-"),
        (0.0, "0"),
        (-0.0, "0"),
        (1.2345e-7, "1.23e-07"),
        (-0.418, "-4.18e-01"),
        (1e300, "1.00e+300"),
        ("nan", "nan"),
        ("-inf", "-inf"),
    ],
)
def test_numbers_have_three_digits_and_none_is_not_zero(stored, printed):
    assert format_number(stored) == printed


@pytest.mark.parametrize(
    ("location", "printed"),
    [
        (Location(), ""),
        (Location(file="net.py"), "net.py"),
        (Location(file="net.py", line=12), "net.py:12"),
        (Location(line=12), ""),
        (Location(module="fc1", op="aten.addmm"), "fc1, aten.addmm"),
        (Location(file="net.py", line=12, module="fc1", op="aten.addmm"), "net.py:12, fc1, aten.addmm"),
    ],
)
def test_a_place_prints_what_is_known_of_it(location, printed):
    assert str(location) == printed


BASE = ("GC401", "net.py:make_model", "eager", "gradient", "param:fc1.weight")


def test_a_fingerprint_is_16_hex_digits_and_stays_the_same():
    # sha256 of the five words with a zero byte between them, by coreutils: printf '…\0…' | sha256sum
    assert fingerprint(*BASE) == "1c8c45deed0adefc"


@pytest.mark.parametrize("field", range(5))
def test_another_code_target_form_quantity_or_tensor_is_another_finding(field):
    changed = [*BASE[:field], "other", *BASE[field + 1 :]]
    assert fingerprint(*changed) != fingerprint(*BASE)


def test_a_name_that_runs_into_the_next_is_another_finding():
    assert fingerprint("GC401", "ab", "c", None, None) != fingerprint("GC401", "a", "bc", None, None)
