"""Energies of molecules, and the forces on their atoms: minus the derivative, by autograd inside forward.

``gradctl export sample_models/energy_and_forces.py -o potential.onnx`` writes both into one ONNX file, although
torch.export rejects such a model. ``gradctl gradcheck`` compares the forces with the derivative of the energy (GC425).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Potential(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def energies(self, positions: Tensor) -> Tensor:
        first, second = torch.triu_indices(positions.shape[1], positions.shape[1], offset=1)
        distances = (positions[:, first] - positions[:, second]).norm(dim=-1, keepdim=True)
        return self.pair(torch.exp(-distances)).sum(dim=(1, 2))

    def forward(self, positions: Tensor) -> dict[str, Tensor]:
        if not positions.requires_grad:
            positions = positions.clone().requires_grad_()
        energies = self.energies(positions)
        (slope,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        return {"energies": energies, "forces": -slope}


def total_energy(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["energies"].sum()


def make_model() -> Potential:
    torch.manual_seed(0)
    return Potential()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)),)
