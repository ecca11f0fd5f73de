"""Samples whose gradient is an implicit reparameterisation (Gamma, Beta, Dirichlet, StudentT, Chi2): right.

Torch documents the estimator, good to 6e-4, and it is no derivative of the path that a seed draws: taken as it is, with
a note. What lies before and after such a sample is judged as ever.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

SAMPLED = {
    "Gamma": lambda a: D.Gamma(a, 1.0 + a).rsample(),
    "Beta": lambda a: D.Beta(a, 2 * a).rsample(),
    "Dirichlet": lambda a: D.Dirichlet(a).rsample(),
    "StudentT": lambda a: D.StudentT(a + 2, a, 1.0).rsample(),
    "Chi2": lambda a: D.Chi2(a).rsample(),
    "InverseGamma": lambda a: D.InverseGamma(a + 2, a).rsample(),
    "FisherSnedecor": lambda a: D.FisherSnedecor(a + 1, a + 5).rsample(),
}


class Sampling(nn.Module):
    def __init__(self, sample):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.sample = nn.Linear(5, 6), nn.Linear(6, 3), sample

    def forward(self, x):
        return self.after(F.dropout(self.sample(F.softplus(self.before(x)) + 0.5), 0.3))


@pytest.mark.parametrize("name", SAMPLED)
def test_a_documented_estimator_passes_with_a_note(name):
    unit = judge(Sampling(SAMPLED[name]), X)
    assert_passes(unit)
    assert any("implicit reparameterisation" in each.message for each in unit.findings if each.code == "GC404")


@pytest.mark.parametrize("name", ["Gamma", "Dirichlet"])
@pytest.mark.parametrize("parameter", ["before.weight", "after.weight"])
def test_a_mistake_beside_a_sample_is_named(name, parameter):
    unit = judge(plant(Sampling(SAMPLED[name]), parameter, "scale 1.1"), X)
    assert wrong_tensors(unit) == [f"param:{parameter}"]


@pytest.mark.parametrize("distribution", [D.Normal, D.Gumbel])
def test_a_reparameterised_sample_is_judged_by_its_path_without_a_note(distribution):
    unit = judge(Sampling(lambda a: distribution(a, a).rsample()), X)
    assert_passes(unit)
    assert "GC404" not in codes(unit)
