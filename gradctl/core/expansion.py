"""The size of a structure with all references followed: a few kilobytes can expand beyond any memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Endless(Exception):
    """A structure that holds itself (``is_cycle``) or is too deep, at ``key``."""

    def __init__(self, key: Any, *, is_cycle: bool) -> None:
        super().__init__("it holds itself" if is_cycle else "it lies too deep in others")
        self.key, self.is_cycle = key, is_cycle


def expanded_size(
    start: Key, inside: Callable[[Key], Iterable[Key]], deepest: int, known: dict[Key, int] | None = None
) -> int:
    """Return how many parts a structure has, one that is referred to twice counted twice; it is walked once.

    Args:
        start: its key.
        inside: returns the keys of the parts of one, repeated as often as they occur.
        deepest: the largest depth.
        known: sizes that were found before, by key; filled.

    Raises:
        Endless: it holds itself, or more lie in each other.
    """
    sizes = {} if known is None else known
    above: dict[Key, Iterator[Key]] = {}
    counted: dict[Key, int] = {}
    pending = [start]
    while pending:
        key = pending[-1]
        if key not in above:
            above[key], counted[key] = iter(inside(key)), 1
        for part in above[key]:
            if part in sizes:
                counted[key] += sizes[part]
                continue
            if part in above or len(pending) > deepest:
                raise Endless(part, is_cycle=part in above)
            pending.append(part)
            break
        else:
            sizes[key] = counted[key]
            del above[pending.pop()]
            if pending:
                counted[pending[-1]] += sizes[key]
    return sizes[start]
