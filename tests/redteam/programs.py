"""All programs: places with a bug, their clean twins, and right programs of plain torch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.redteam.functions import Operation
from tests.redteam.places import PLACES
from tests.redteam.right import RIGHT

__all__ = ["Program", "planted_programs", "right_programs"]

_BUGS_A_PLACE = 4


@dataclass(frozen=True)
class Program:
    """A model to check. ``bug`` is what is wrong with it, None if it is right; ``is_hidden``: no gradient shows it."""

    kind: str
    place: str
    formula: str
    bug: str | None = None
    is_hidden: bool = False

    @property
    def name(self) -> str:
        """Return what identifies it."""
        return " / ".join(filter(None, (self.kind, self.place, self.formula, self.bug)))

    @property
    def twin(self) -> Program:
        """Return the same program without its bug."""
        return Program(self.kind, self.place, self.formula)

    def build(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the model and its inputs, the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.kind == "right":
                return RIGHT[self.place]()
            return PLACES[self.place].build(
                lambda dtype=None, **more: Operation(self.formula, self.bug, dtype=dtype, **more)
            )


def planted_programs(seed: int = 0) -> list[Program]:
    """Return some bugs in every place, each formula and each bug about as often as any other."""
    generator = random.Random(seed)
    used: dict[str, int] = {}
    programs = []
    for name, place in PLACES.items():
        left = sorted(place.pairs())
        for _ in range(_BUGS_A_PLACE):
            if not left:
                break
            generator.shuffle(left)
            formula, bug = min(left, key=lambda pair: used.get(pair[0], 0) + used.get(pair[1], 0))
            used[formula], used[bug] = used.get(formula, 0) + 1, used.get(bug, 0) + 1
            left = [pair for pair in left if pair[0] != formula]
            programs.append(Program(place.kind, name, formula, bug, place.is_hidden))
    return programs


def right_programs(seed: int = 0) -> list[Program]:
    """Return the clean twins of ``planted_programs(seed)``, and the programs of ``RIGHT``."""
    twins = dict.fromkeys(program.twin for program in planted_programs(seed))
    return [*twins, *(Program("right", name, "") for name in RIGHT)]
