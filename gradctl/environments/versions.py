"""Versions of torch, and ranges of them as ``--bisect-torch`` has them: ``2.10..2.14``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_Release = tuple[int, ...]

_RELEASE = re.compile(r"(\d+(?:\.\d+)*)(?:\.post(\d+))?(?:\+[A-Za-z0-9.]+)?")
_BOUND = re.compile(r"\d{1,6}(?:\.\d{1,6}){0,2}")


@dataclass(frozen=True, slots=True)
class VersionRange:
    """All releases from the first to the last bound; ``2.14`` includes 2.14.1. An empty bound is no limit."""

    first: _Release
    last: _Release

    def __str__(self) -> str:
        return "..".join(".".join(map(str, bound)) for bound in (self.first, self.last))

    def select(self, versions: Iterable[str]) -> list[str]:
        """Return the versions in the range, oldest first, each once: builds of a version (``+cpu``) are one.

        A pre-release is not in it.
        """
        releases = {release: version.partition("+")[0] for version in versions if (release := release_of(version))}
        return [releases[each] for each in sorted(releases) if self._has(each)]

    def _has(self, release: _Release) -> bool:
        is_late_enough = release[: len(self.first)] >= self.first
        return is_late_enough and (not self.last or release[: len(self.last)] <= self.last)


def parse_range(text: str) -> VersionRange:
    """Return the range in a text like ``2.10..2.14``; either end may be missing.

    Raises:
        ValueError: the text is no range, or its ends are in the wrong order; says which, with an example.
    """
    first, dots, last = text.strip().partition("..")
    bounds = [bound for bound in (first, last) if bound]
    if not dots or not bounds or not all(_BOUND.fullmatch(bound) for bound in bounds):
        raise ValueError(f"{text!r} is not a range of versions; write, for example, 2.10..2.14.")
    found = VersionRange(_numbers(first), _numbers(last))
    if found.last and found.first[: len(found.last)] > found.last:
        raise ValueError(f"{text!r} ends before it begins; write {last}..{first}.")
    return found


def release_of(version: str) -> _Release | None:
    """Return the numbers of a release, by which releases are in order; None for a pre-release or any other text."""
    found = _RELEASE.fullmatch(version)
    if found is None:
        return None
    numbers = (*_numbers(found[1]), 0, 0)[:3]
    return (*numbers, int(found[2] or 0))


def _numbers(text: str) -> _Release:
    return tuple(int(part) for part in text.split(".") if part)
