"""No false alarm: right sample models, random nets (some exactly at kinks) and tiny published architectures, as static
forms. Each form passes without a finding above a note, or refuses the model and says why.
"""

from __future__ import annotations

import importlib
from itertools import product

import pytest

from tests.compared import compared, different, verdicts
from tests.sweeps import sampled
from tests.zoo import RIGHT_SAMPLES, TRANSFORMERS, random_net

FORMS = ("trace", "script", "export", "aot")
# Right models that trace gets wrong: it drops no_grad, and takes one side of a branch.
WRONG = {("no_grad_inside", "trace"), ("control_flow", "trace")}

# Right nets that TorchScript's own autodiff gets wrong (torch 2.13): on an input other than the one traced, five biases
# below a ReLU6 get gradients 45 to 135 times too large.
AUTODIFF_WRONG = {(27, "trace")}

# A net of each family, some at kinks (multiples of 3), in two forms each.
NETS = list(zip((9, 42, 118, 160) * 2, (*FORMS, "export", "aot", "trace", "script"), strict=True))
ARCHITECTURES = [("wav2vec2", "trace"), ("gpt2", "export"), ("gpt2", "aot")]


def assert_silent(unit) -> None:
    if unit.status == "unsupported":
        assert (unit.verdict, bool(unit.reason)) == ("skipped", True)
        return
    found = (unit.verdict, different(unit), [each.message for each in unit.findings if each.severity != "note"])
    assert found == ("pass", {}, []), found


@pytest.mark.parametrize(("name", "form"), sampled(product(RIGHT_SAMPLES, FORMS), 12, always=WRONG))
def test_a_right_sample_model_passes_or_is_refused(name, form):
    sample = importlib.import_module(f"sample_models.{name}")
    unit = compared(form, sample.make_model(), *sample.example_inputs(), named=False)
    if (name, form) in WRONG:
        assert unit.verdict == "fail"
    else:
        assert_silent(unit)


@pytest.mark.parametrize(("name", "form"), sampled(product(["resnet", "transformer"], FORMS), 2))
def test_a_sample_model_in_training_mode_passes_or_is_refused(name, form):
    sample = importlib.import_module(f"sample_models.{name}")
    assert_silent(compared(form, sample.make_model().train(), *sample.example_inputs(), named=False))


@pytest.mark.parametrize(("seed", "form"), sampled(product(range(200), FORMS), always=NETS))
def test_a_random_right_net_passes_or_is_refused(seed, form):
    model, args = random_net(seed)
    unit = compared(form, model, *args, named=False)
    if (seed, form) in AUTODIFF_WRONG:
        assert "wrong" in verdicts(unit).values()
    else:
        assert_silent(unit)


# TorchScript takes none of them from source.
@pytest.mark.parametrize(
    ("name", "form"), sampled(product(TRANSFORMERS, ["trace", "export", "aot"]), always=ARCHITECTURES)
)
def test_a_published_architecture_passes_or_is_refused(name, form):
    model, args, kwargs = TRANSFORMERS[name]()
    assert_silent(compared(form, model, *args, kwargs=kwargs, named=False))
