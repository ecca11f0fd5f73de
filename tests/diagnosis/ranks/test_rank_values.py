"""How parts make a whole: copies, shards along an axis, terms of a sum."""

from __future__ import annotations

import pytest
import torch

from gradctl.diagnosis.ranks.rank_values import relation

WHOLE = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)


@pytest.mark.parametrize(
    ("parts", "factor", "expected"),
    [
        ([WHOLE, WHOLE], 1.0, ("same", 0)),
        ([2 * WHOLE, 2 * WHOLE], 2.0, ("same", 0)),
        (WHOLE.split([1, 2]), 1.0, ("shard", 0)),
        (WHOLE.chunk(2, 1), 1.0, ("shard", 1)),
        (WHOLE.chunk(2, 1), 2.0, ("other", 0)),
        (WHOLE.chunk(2, 1)[::-1], 1.0, ("other", 0)),
        ([0.3 * WHOLE, 0.7 * WHOLE], 1.0, ("sum", 0)),
        ([0.3 * WHOLE, 0.6 * WHOLE], 1.0, ("other", 0)),
        ([WHOLE, None], 1.0, ("other", 0)),
        ([WHOLE[0], WHOLE[0]], 1.0, ("other", 0)),
    ],
)
def test_a_relation_is_the_one_by_which_the_parts_were_made(parts, factor, expected):
    assert relation(WHOLE, list(parts), factor) == expected
