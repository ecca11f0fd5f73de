"""Sweeps over many cases of one meaning: a seeded sample of them runs by default, the others are ``slow``."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest

__all__ = ["sampled"]


def sampled(
    cases: Iterable[Any], count: int = 0, *, always: Collection[Any] = (), seed: int = 0, id: Callable[[Any], str] = str
) -> list[Any]:
    """Return all cases as parameters, in their order, those outside the sample marked slow.

    Args:
        cases: hashable; a tuple is a case of several arguments.
        count: how many are drawn, besides ``always``.
        always: those that once failed, or show what no other shows.
        seed: of the draw.
        id: the name of a case of one argument.
    """
    cases = [*cases]
    unknown = {*always} - {*cases}
    assert not unknown, f"there is no case {unknown}"
    chosen = {*always, *random.Random(seed).sample([case for case in cases if case not in always], count)}
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=None if isinstance(case, tuple) else id(case),
            marks=[] if case in chosen else pytest.mark.slow,
        )
        for case in cases
    ]
