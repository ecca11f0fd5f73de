"""The table of forms: a speedup is shown where it is more than noise, and a column only if a form has one."""

from __future__ import annotations

import pytest

from gradctl.core.findings import Timing, Unit
from gradctl.report.text.matrix import matrix_of_forms
from gradctl.report.text.screen import Screen


def shown(*timings):
    """Return the words of the table, line by line."""
    units = [Unit(target="net.py", form=f"form{k}", verdict="pass", timing=each) for k, each in enumerate(timings)]
    screen = Screen(100)
    screen.table(*matrix_of_forms(units), names=4)
    return [line.split() for line in screen.text().splitlines()]


def timing(forward, noise, training=None, training_noise=None):
    eager = None if training is None else 1.0
    return Timing(
        capture=0.5, forward=forward, eager_forward=1.0, forward_noise=noise,
        training=training, eager_training=eager, training_noise=training_noise,
    )  # fmt: skip


def test_a_speedup_is_eagers_time_by_the_forms():
    *_, fast, slow = shown(timing(0.5, 0.1, 0.8, 0.1), timing(2.0, 0.1, 1.25, 0.1))
    assert (fast[-2:], slow[-2:]) == (["2.00x", "1.25x"], ["0.50x", "0.80x"])


@pytest.mark.parametrize("noise", [0.3, None])
def test_what_is_within_its_noise_or_was_timed_once_has_no_column(noise):
    first, second, row = shown(timing(0.8, noise, 0.5, 0.1))
    assert "forward" not in first + second
    assert row[-2:] == ["0.50", "s"] or row[-1] == "2.00x"


def test_without_a_time_there_are_no_columns_of_times():
    assert shown(None)[0] == ["form", "outputs", "gradients", "buffers"]
