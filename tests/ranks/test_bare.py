"""Without gradctl: each mistake changes a gradient by more than a tenth, and its right twin by rounding only."""

from __future__ import annotations

import pytest

from tests.ranks import bare

# Which masks are drawn is random: what is wrong with this one is that the ranks draw the same (gradctl compares those).
_RANDOM = "same_masks"


@pytest.fixture(scope="module")
def errors():
    return bare.errors(bare.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bare.NAMES if name != _RANDOM])
def test_the_mistake_changes_a_gradient_and_its_right_twin_none(name, errors):
    assert errors[name, True][1] > 0.1
    assert errors[name, False][1] < 1e-14
