"""Nested arguments of torch calls are rebuilt in their own type where that type can be made of its items."""

from collections import namedtuple

import pytest
import torch

from gradctl.tracing.tracer import map_nested

Pair = namedtuple("Pair", ["first", "second"])


class Ordered(tuple):
    """A tuple that is not made of one sequence."""

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, [2, {"a": 3}]), (2, [3, {"a": 4}])),
        (Pair(1, (2,)), Pair(2, (3,))),
        (Ordered(1, 2), (2, 3)),
        (torch.return_types.max((1, 2)), torch.return_types.max((2, 3))),
    ],
    ids=["tuple, list and dictionary", "named tuple", "a subclass with its own constructor", "torch.return_types"],
)
def test_each_item_is_mapped(value, expected):
    mapped = map_nested(lambda item: item + 1, value)
    assert mapped == expected
    assert type(mapped) is type(expected)
