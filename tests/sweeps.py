"""Sweeps over many cases of one meaning: a seeded sample of them runs by default, the others are ``slow``."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["sampled"]


def sampled(values: Iterable[Any], count: int, *, always: Collection[Any] = (), seed: int = 0, **options: Any) -> list:
    """Return all values as parameters, in their order, those outside the sample marked slow.

    Args:
        values: the cases; hashable.
        count: how many are drawn, besides ``always``.
        always: those that once failed, or show what no other shows.
        seed: of the draw.
        options: of ``pytest.param``; ``id`` may be a function of the value.
    """
    values = [*values]
    others = [value for value in values if value not in always]
    chosen = {*always, *random.Random(seed).sample(others, min(count, len(others)))}
    id_of = options.pop("id", None)
    return [
        pytest.param(
            value,
            id=id_of(value) if id_of else None,
            marks=[] if value in chosen else pytest.mark.slow,
            **options,
        )
        for value in values
    ]
