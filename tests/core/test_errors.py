"""The errors a user can meet: code, sentence, exit code, and the nearest name."""

from __future__ import annotations

import pytest

from gradctl.core.errors import GradctlError, NothingToCheck, ResourceError, TargetError, TrustError, nearest


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [(GradctlError, 2), (TargetError, 2), (NothingToCheck, 5), (TrustError, 2), (ResourceError, 4)],
)
def test_each_kind_has_its_exit_code(kind, exit_code):
    assert kind("GC100", "…").exit_code == exit_code


def test_an_error_prints_its_code_before_its_sentence():
    error = TargetError("GC102", "net.py has no 'Nett'.", details="frames")
    assert str(error) == "GC102 net.py has no 'Nett'."
    assert (error.code, error.message, error.details) == ("GC102", "net.py has no 'Nett'.", "frames")


def test_one_error_can_have_an_exit_code_of_its_own():
    assert ResourceError("GC131", "…", exit_code=2).exit_code == 2
    assert ResourceError("GC803", "…").exit_code == 4


def test_the_nearest_name_is_proposed():
    assert nearest("Nett", ["make_net", "Net", "Other"]) == " (did you mean 'Net'?)"


def test_nothing_is_proposed_where_nothing_is_near():
    assert nearest("Nett", ["Transformer"]) == ""
    assert nearest("Nett", []) == ""
