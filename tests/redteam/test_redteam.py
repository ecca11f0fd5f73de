"""A sample of the planted bugs is found, a sample of the right programs passes; ``-m slow`` tries all of them.

``python tests/benchmarks/redteam.py`` prints the rates.
"""

from __future__ import annotations

import random

import pytest

from tests.redteam.programs import planted_programs, right_programs
from tests.redteam.trial import changes, tried
from tests.sweeps import sampled

PLANTED, RIGHT = planted_programs(), right_programs()


def in_part(programs, count):
    return sampled(programs, count, seed=18, id=lambda program: program.name)


def test_there_are_enough_of_them_and_no_two_are_the_same():
    assert len({program.name for program in PLANTED}) == len(PLANTED) >= 300
    assert len({program.name for program in RIGHT}) == len(RIGHT) >= 600


def test_each_planted_program_has_its_clean_twin_among_the_right_ones():
    assert {program.twin for program in PLANTED} <= set(RIGHT)


def test_nearly_all_of_the_bugs_change_a_gradient_of_their_program():
    shown = [program for program in PLANTED if not program.is_hidden]
    sample = random.Random(0).sample(shown, 40)
    assert sum(bool(changes(program)) for program in sample) >= 38


@pytest.mark.parametrize("program", in_part(PLANTED, 10))
def test_a_planted_bug_is_found_or_named(program):
    trial = tried(program)
    assert trial.outcome in ("found", "named", "equal"), trial.said


@pytest.mark.parametrize("program", in_part(RIGHT, 36))
def test_a_right_program_passes(program):
    trial = tried(program)
    assert trial.outcome in ("passed", "warned"), trial.said
