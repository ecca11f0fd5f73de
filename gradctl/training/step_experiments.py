"""Why a variant differs: runs with one thing changed, each of which tests one cause.

A variant's file may have a function ``experiments(argument)``: a generator of experiments, which is sent whether the
variant, as an experiment has altered it, agrees with the plain step. A cause is named only if it does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from gradctl.training.trainer import Trainer

Alter = Callable[[Trainer, str | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    """One thing changed.

    Attributes:
        code: of the rule that is the cause if the variant agrees then.
        said: returns the cause in a sentence, once the experiment has run.
        hint: what to do.
        alter: changes a run to the variant without the cause.
        plain: changes the plain step with which it is compared, if the cause is taken off there, too.
    """

    code: str
    said: Callable[[], str]
    hint: str
    alter: Alter
    plain: Alter | None = None


Experiments = Generator[Experiment, bool, None]
