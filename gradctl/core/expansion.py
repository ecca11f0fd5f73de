"""The size of a structure with all references followed: a few kilobytes can expand beyond any memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Endless(Exception):
    """A structure that holds itself (``is_cycle``) or is too deep, at ``key``."""

    def __init__(self, key: Any, *, is_cycle: bool) -> None:
        super().__init__("it holds itself" if is_cycle else "it lies too deep in others")
        self.key, self.is_cycle = key, is_cycle


def expanded_size(
    start: Key,
    inside: Callable[[Key], Iterable[Key]],
    deepest: int,
    known: dict[Key, int] | None = None,
    above: tuple[Key, ...] = (),
) -> int:
    """Return how many parts a structure has, one that is referred to twice counted twice; it is walked once.

    Args:
        start: its key.
        inside: returns the keys of the parts of one, repeated as often as they occur.
        deepest: the largest depth, well below Python's limit of recursion.
        known: sizes that were found before, by key; filled.
        above: the structures that ``start`` is in, the outermost first.

    Raises:
        Endless: it holds itself, or more lie in each other.
    """
    sizes = {} if known is None else known
    if start not in sizes:
        if start in above or len(above) > deepest:
            raise Endless(start, is_cycle=start in above)
        within = (*above, start)
        sizes[start] = 1 + sum(expanded_size(part, inside, deepest, sizes, within) for part in inside(start))
    return sizes[start]
