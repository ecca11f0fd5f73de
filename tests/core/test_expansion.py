"""The size of a structure with all references followed, which is walked once however large that is."""

from __future__ import annotations

import pytest

from gradctl.core.expansion import Endless, expanded_size

PARTS = {"a": "bbc", "b": "cc", "c": "", "loop": "x", "x": "cy", "y": "x"}


@pytest.mark.parametrize(("start", "size"), [("c", 1), ("b", 1 + 2), ("a", 1 + 3 + 3 + 1)])
def test_what_is_referred_to_twice_is_counted_twice(start, size):
    assert expanded_size(start, PARTS.__getitem__, 10) == size


def test_doubling_fifty_times_is_counted_and_not_done():
    assert expanded_size(50, lambda level: [level - 1] * 2 if level else [], 100) == 2**51 - 1


def test_sizes_are_kept_for_the_next_start():
    known = {}
    expanded_size("b", PARTS.__getitem__, 10, known)
    assert known == {"b": 3, "c": 1}
    assert expanded_size("a", {"a": "bb"}.__getitem__, 10, known) == 7


def test_what_holds_itself_is_named():
    with pytest.raises(Endless, match="it holds itself") as caught:
        expanded_size("loop", PARTS.__getitem__, 10)
    assert (caught.value.key, caught.value.is_cycle) == ("x", True)


@pytest.mark.parametrize(("deepest", "ends"), [(9, False), (10, True)])
def test_only_so_many_lie_in_each_other(deepest, ends):
    def inside(level):
        return [level - 1] if level else []

    if ends:
        assert expanded_size(10, inside, deepest) == 11
    else:
        with pytest.raises(Endless, match="it lies too deep in others") as caught:
            expanded_size(10, inside, deepest)
        assert not caught.value.is_cycle
