"""A network that is frozen for a part of forward (``set_requires_grad(D, False)`` around a generator's loss): meant.

What reads a parameter while it asks for no gradient takes it as a constant, and so do the finite differences: a pass
with a note. A mistake beside it is named.
"""

import pytest
import torch
from torch import nn

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

GENERATOR = torch.Generator().manual_seed(1)
NOISE, REAL = torch.randn(5, 3, generator=GENERATOR), torch.randn(5, 4, generator=GENERATOR)


def by_module(module, asks):
    module.requires_grad_(asks)


def by_parameter(module, asks):
    for parameter in module.parameters():
        parameter.requires_grad_(asks)


def by_property(module, asks):
    for parameter in module.parameters():
        parameter.requires_grad = asks


class GanStep(nn.Module):
    def __init__(self, ask, critic=None):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.ask = nn.Linear(3, 4), ask
        self.critic = critic or nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1))

    def score(self, x):
        return self.critic(x)

    def forward(self, noise, real):
        fake = self.generator(noise)
        self.ask(self.critic, False)
        generated = -self.score(fake).mean()
        self.ask(self.critic, True)
        return generated, self.score(fake.detach()).mean() - self.score(real).square().mean()


class Recurrent(GanStep):
    def score(self, x):
        return self.critic(x)[0]


class NeverThawed(GanStep):
    """Frozen until after the backward, in which a parameter that asks for no gradient then receives none."""

    def forward(self, noise, real):
        told = self.score(real).square().mean()
        self.ask(self.critic, False)
        return told - self.score(self.generator(noise)).mean()


class ClippedWhileFrozen(GanStep):
    def forward(self, noise, real):
        fake = self.generator(noise)
        self.ask(self.critic, False)
        for parameter in self.critic.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        generated = -self.score(fake).mean()
        self.ask(self.critic, True)
        return generated, self.score(real).square().mean()


@pytest.mark.parametrize("ask", [by_module, by_parameter, by_property])
@pytest.mark.parametrize("step", [GanStep, ClippedWhileFrozen])
def test_a_critic_that_is_frozen_for_a_part_passes_with_a_note(step, ask):
    unit = judge(step(ask), NOISE, REAL)
    assert_passes(unit)
    assert "GC404" in codes(unit)


def test_a_critic_that_is_still_frozen_in_the_backward_receives_no_gradient():
    unit = judge(NeverThawed(by_module), NOISE, REAL)
    assert wrong_tensors(unit) == [f"param:critic.{layer}.{name}" for layer in "02" for name in ("bias", "weight")]


def test_a_recurrent_critic_that_is_frozen_for_a_part_passes():
    assert_passes(judge(Recurrent(by_module, nn.LSTM(4, 3)), NOISE, REAL))


@pytest.mark.parametrize("parameter", ["generator.weight", "critic.2.weight", "critic.0.bias"])
def test_a_mistake_beside_it_is_named(parameter):
    unit = judge(plant(GanStep(by_parameter), parameter, "scale 1.1"), NOISE, REAL)
    assert wrong_tensors(unit) == [f"param:{parameter}"]


def test_what_freezes_nothing_gets_no_note():
    unit = judge(nn.Sequential(nn.Linear(3, 2)).requires_grad_(True), NOISE)
    assert "GC404" not in codes(unit)
