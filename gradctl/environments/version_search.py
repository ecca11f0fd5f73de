"""Which of several versions changed a verdict: a bisection between two versions whose verdicts differ.

A version without a verdict (one that cannot be installed, say) is skipped: the search moves inward from the ends, and
in the middle takes the nearest one that has a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Whether a version passes; None if that cannot be decided.
_Verdict = Callable[[str], bool | None]


@dataclass(frozen=True, slots=True)
class Change:
    """The result of a search.

    Attributes:
        before, after: the two versions between which the verdict changes. Without a change, the ends: the oldest and
            the newest version that has a verdict, the same version if it is the only one, and None if none has.
        is_found: whether the verdicts of the two differ.
        skipped: the versions between the two, none of which has a verdict; only of a change that was found.
    """

    before: str | None
    after: str | None
    is_found: bool
    skipped: tuple[str, ...] = ()


def find_change(versions: Sequence[str], verdict: _Verdict) -> Change:
    """Return where the verdict changes between the oldest and the newest version that has one.

    ``verdict`` is called once for a version at most. If the verdict changes several times, one of the changes is found.

    Args:
        versions: oldest first.
        verdict: whether a version passes.
    """
    verdicts: dict[int, bool | None] = {}

    def judge(index: int) -> bool | None:
        if index not in verdicts:
            verdicts[index] = verdict(versions[index])
        return verdicts[index]

    everywhere = range(len(versions))
    low = next((each for each in everywhere if judge(each) is not None), None)
    if low is None:
        return Change(None, None, is_found=False)
    high = next(each for each in reversed(everywhere) if judge(each) is not None)
    if judge(low) == judge(high):
        return Change(versions[low], versions[high], is_found=False)
    while (middle := next((each for each in _from_middle(low, high) if judge(each) is not None), None)) is not None:
        if judge(middle) == judge(low):
            low = middle
        else:
            high = middle
    return Change(versions[low], versions[high], is_found=True, skipped=tuple(versions[low + 1 : high]))


def most_tries(count: int) -> int:
    """Return how many of ``count`` versions the search tries if each has a verdict: both ends, and half after half."""
    return min(count, 2 + max(count - 2, 0).bit_length())


def _from_middle(low: int, high: int) -> list[int]:
    """Return the indices between two, the nearest to the middle first."""
    return sorted(range(low + 1, high), key=lambda each: abs(2 * each - low - high))
