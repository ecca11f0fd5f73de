"""Training schemes that stop gradients on purpose: BYOL, VQ-VAE, a mean teacher. Silent but for GC404.

Each has a twin with one gradient wrong by a thousandth, which is named.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.judged import assert_passes, codes, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class BYOL(nn.Module):
    """An online net predicts what a frozen copy of it makes of another view."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = nn.Linear(8, 6), nn.Linear(6, 6)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        prediction = self.predictor(self.online(x).tanh())
        with torch.no_grad():
            target = self.target(x.flip(1)).tanh()
        return 2 - 2 * F.cosine_similarity(prediction, target)


class VQVAE(nn.Module):
    """The nearest code replaces the latent value, its gradient is copied over, and two losses pull them together."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.decoder = nn.Linear(8, 3), nn.Linear(3, 8)
        self.codebook = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.online(x)
        code = self.codebook[torch.cdist(latent, self.codebook).argmin(1)]
        loss = F.mse_loss(code, latent.detach()) + 0.25 * F.mse_loss(latent, code.detach())
        return self.decoder(latent + (code - latent).detach()), loss


class MeanTeacher(nn.Module):
    """The teacher is a running mean of the student, moved in every forward; the student follows its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(8, 4)
        self.teacher = copy.deepcopy(self.online).requires_grad_(False)
        nn.init.normal_(self.teacher.weight)

    @torch.no_grad()
    def move_teacher(self) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
            teacher.mul_(0.9).add_(student, alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.move_teacher()
        return F.mse_loss(self.online(x).tanh(), self.teacher(x).tanh().detach())


class PulledToMean(MeanTeacher):
    """As above, and the student's weights are pulled towards the teacher's, which were moved in place just now."""

    def forward(self, x: Tensor) -> Tensor:
        self.move_teacher()
        return self.online(x).square().mean() + (self.online.weight - self.teacher.weight).square().sum()


SCHEMES = (BYOL, VQVAE, MeanTeacher, PulledToMean)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_that_stops_gradients_passes_with_a_note(scheme):
    torch.manual_seed(0)
    unit = judge(scheme(), X)
    assert_passes(unit)
    assert "GC404" in codes(unit)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_mistake_inside_the_scheme_is_named(scheme):
    torch.manual_seed(0)
    unit = judge(plant(scheme(), "online.weight", "scale 1.001"), X)
    assert wrong_tensors(unit) == ["param:online.weight"]
