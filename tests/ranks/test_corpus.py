"""Each published mistake is named by ``compare --form ranks:2`` with parameters and cause; its twin is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradctl.commands.compare import compare_one
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject
from tests.ranks.bare import NAMES

FOLDER = Path(__file__).parent
# By target: the cause, what the message says of it, and the parameters with a wrong gradient; None: many.
MISTAKES = {
    "batch_norm": ("GC228", "norm computes on each rank's part of axis 0 alone", None),
    "column_parallel": (
        "GC225",
        "what norm returns (up takes it)",
        {"norm.weight", "norm.bias", "embed.weight", "embed.bias"},
    ),
    "divided_twice": ("GC221", "1/2 of that", {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
    "dtensor_to_local": ("GC225", "what router returns", {"router.weight", "router.bias"}),
    "gather_without_gradient": ("GC226", "torch.distributed.all_gather", {"text.weight", "text.bias"}),
    "local_attention": ("GC228", "attention computes on each rank's part of axis 1", None),
    "loss_parallel": ("GC226", "ShardedLogSoftmax", {"head.weight", "head.bias", "embed.weight", "embed.bias"}),
    "mean_of_means": ("GC227", "0.786, 0.214", {"embed.weight", "head.weight", "head.bias"}),
    "no_backward": ("GC226", "torch.distributed.all_reduce", {"fc1.weight", "fc1.bias", "codes.weight", "codes.bias"}),
    "no_sync": ("GC222", "their mean is right", {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
    "not_divided": ("GC221", "2 times too large", {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
    "one_rank": ("GC223", "only rank 0", {"scale"}),
    "reduced_twice": ("GC226", "SumBoth", {"up.weight", "up.bias", "down.weight", "embed.weight", "embed.bias"}),
    "row_parallel": ("GC225", "what down returns", None),
    "sequence_norm": ("GC222", "their mean is right", {"norm.weight", "norm.bias"}),
    "stale_keys": ("GC226", "StaleGather", None),
    "tied_stages": ("GC224", "embed.weight on rank 0 and head.weight on rank 1", {"embed.weight"}),
    "used_outside": ("GC222", "their mean is right", {"head.weight", "head.bias"}),
}
# What changes no gradient of the mean over random numbers: by code and severity of the finding.
OTHERS = {
    "other_masks": ("GC626", "error"),
    "same_masks": ("GC626", "warning"),
}


def compared(name, wrong):
    options = TargetOptions(str(FOLDER / f"{name}.py"), arguments=(f"wrong={wrong}",))
    return compare_one(load_subject(options), "ranks:2")


def line_of(location):
    """Return the line of a target's file that a location names."""
    return Path(location.file).read_text().splitlines()[location.line - 1]


def test_each_mistake_has_an_expectation():
    assert {*MISTAKES, *OTHERS} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_parameters_cause_and_line(name):
    cause, words, parameters = MISTAKES[name]
    unit = compared(name, wrong=True)
    errors = [finding for finding in unit.findings if finding.severity == "error"]
    assert unit.verdict == "fail"
    assert {finding.cause for finding in errors} == {cause}
    assert all(words in finding.cause_message for finding in errors)
    if parameters is not None:
        named = {finding.tensor.removeprefix("param:") for finding in errors if finding.tensor.startswith("param:")}
        assert named == parameters
    place = errors[0].location
    assert (
        place.module or Path(place.file).parent == FOLDER.relative_to(Path.cwd()) or Path(place.file).parent == FOLDER
    )
    if cause in ("GC221", "GC222", "GC223", "GC224"):
        assert line_of(place).startswith("def parallelize")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_what_no_mean_gradient_shows_is_a_finding_of_its_own(name):
    code, severity = OTHERS[name]
    (found,) = [finding for finding in compared(name, wrong=True).findings if finding.code == code]
    assert found.severity == severity
    assert "torch.manual_seed" in line_of(found.location)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_right_twin_is_silent(name):
    unit = compared(name, wrong=False)
    assert unit.verdict == "pass"
    assert {finding.code for finding in unit.findings} <= {"GC625"}
