"""Two spirals, and a small net that tells them apart: the model of ``index.html``, which trains it in a browser.

``gradctl export sample_models/train_step/spirals.py --graph train-step -o spirals.onnx`` writes the step; the model
returns the loss itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Spirals(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.net(points), labels)


def make_model() -> Spirals:
    torch.manual_seed(0)
    return Spirals()


def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def example_inputs(count: int = 200) -> dict[str, Tensor]:
    labels = torch.arange(count) % 2
    turn = torch.linspace(0.3, 1, count)
    angle = 2.5 * math.pi * turn + math.pi * labels
    noise = 0.02 * torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    points = turn[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + noise
    return {"points": points, "labels": labels}
