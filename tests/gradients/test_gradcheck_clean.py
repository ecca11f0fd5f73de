"""No false alarm: right sample models, random nets (some exactly at kinks), and tiny published architectures."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.judged import assert_passes, codes, finding, judge, wrong_tensors
from tests.sweeps import sampled
from tests.zoo import RIGHT_SAMPLES, TRANSFORMERS, random_net

# What is not the derivative on purpose: the sample, and the Function to allow.
ON_PURPOSE = {"straight_through": "RoundStraightThrough", "gradient_reversal": "ReverseGradient"}
CUTTING_SAMPLES = ("no_grad_inside", "straight_through_detach")

# Drawn once from range(200), so that the default run sees each family of nets and inputs at kinks (multiples of 3).
SAMPLED_SEEDS = (0, 3, 9, 17, 42, 58, 75, 96, 118, 141, 160, 199)
SAMPLED_TRANSFORMERS = ("gpt2", "llama", "mamba", "t5")


def sample_unit(name: str, **options):
    sample = importlib.import_module(f"sample_models.{name}")
    return judge(sample.make_model(), *sample.example_inputs(), **options)


@pytest.mark.parametrize("name", RIGHT_SAMPLES)
def test_a_right_sample_model_passes(name):
    unit = sample_unit(name)
    assert_passes(unit)
    assert ("GC404" in codes(unit)) == (name in CUTTING_SAMPLES)


@pytest.mark.parametrize("name", RIGHT_SAMPLES)
def test_a_pass_states_what_it_could_have_missed(name):
    oracle = sample_unit(name).oracle
    assert (oracle.dtype, oracle.of_error) == ("float64", 0.01)
    assert 0 < oracle.missed_with_probability < 0.01
    assert oracle.forwards < 150


def test_wrong_backward_is_named_by_function_and_parameter():
    unit = sample_unit("wrong_backward")
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["param:act.slope"])
    assert finding(unit, "GC408").allow == "GC408:LeakyReLU"
    assert (finding(unit, "GC401").tensor, finding(unit, "GC401").cause) == ("param:act.slope", "GC408")


@pytest.mark.parametrize("name", ON_PURPOSE)
def test_a_backward_that_is_meant_fails_until_it_is_allowed(name):
    allow = f"GC408:{ON_PURPOSE[name]}"
    before, after = sample_unit(name), sample_unit(name, allows=[allow])
    assert (before.verdict, finding(before, "GC408").allow) == ("fail", allow)
    assert (after.verdict, wrong_tensors(after)) == ("pass", [])
    assert finding(after, "GC408").allowed


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_a_sample_model_passes_in_training_mode(name):
    sample = importlib.import_module(f"sample_models.{name}")
    assert_passes(judge(sample.make_model().train(), *sample.example_inputs()))


@pytest.mark.parametrize("seed", sampled(range(200), always=SAMPLED_SEEDS))
def test_a_random_right_net_passes(seed):
    model, args = random_net(seed)
    assert_passes(judge(model, *args))


@pytest.mark.parametrize("name", sampled(TRANSFORMERS, always=SAMPLED_TRANSFORMERS))
def test_a_published_architecture_passes(name):
    model, args, kwargs = TRANSFORMERS[name]()
    unit = judge(model, *args, kwargs=kwargs)
    assert_passes(unit)
    assert unit.oracle.forwards < 150


def test_progress_says_how_many_steps_and_tensors_there_are():
    said = []
    sample_unit("linear", thorough=True, progress=said.append)
    assert said[0] == "step 1 of 4: running the model in float64"
    total = int(re.fullmatch(r"step 2 of 4: checking (\d+) tensors together", said[1])[1])
    assert [each.rpartition(": ")[0] for each in said[2 : 2 + total]] == [
        f"step 2 of 4: tensor {number} of {total}" for number in range(1, total + 1)
    ]
