from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl.environments.version_search import Change, find_change, most_tries


def searched(verdicts):
    """Return the change among versions "0", "1", … with these verdicts, and the versions that were tried."""
    tried = []

    def verdict(version):
        tried.append(version)
        return verdicts[int(version)]

    return find_change([str(each) for each in range(len(verdicts))], verdict), tried


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_any_first_version_that_differs_is_found(before, after, is_mended):
    verdicts = [not is_mended] * before + [is_mended] * after
    change, tried = searched(verdicts)
    assert change == Change(str(before - 1), str(before), is_found=True)
    assert len(tried) == len(set(tried)) <= most_tries(len(verdicts))


@given(st.lists(st.sampled_from([True, False, None]), max_size=30))
def test_a_change_stands_between_two_versions_that_differ_and_none_between_them_has_a_verdict(verdicts):
    change, tried = searched(verdicts)
    assert len(tried) == len(set(tried))
    if all(each is None for each in verdicts):
        assert change == Change(None, None, is_found=False)
        return
    before, after = int(change.before), int(change.after)
    decided = [each for each in verdicts if each is not None]
    assert change.is_found == (verdicts[before] != verdicts[after]) == (decided[0] != decided[-1])
    if change.is_found:
        assert set(verdicts[before + 1 : after]) <= {None}
        assert change.skipped == tuple(str(each) for each in range(before + 1, after))
    else:
        assert (verdicts[:before], verdicts[after + 1 :]) == ([None] * before, [None] * (len(verdicts) - after - 1))


@pytest.mark.parametrize("count", range(1, 70))
def test_the_number_of_tries_is_that_of_a_bisection(count):
    assert most_tries(count) == (count if count < 3 else 2 + math.ceil(math.log2(count - 1)))
