"""An energy of atom positions and its forces, by ``torch.autograd.grad`` inside forward.

``gradctl gradcheck sample_models/forces.py`` passes: the gradients of the forces are second derivatives of the energy,
and they are checked like any other, as models of molecules are trained on both outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Potential(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not positions.requires_grad:
            positions = positions.clone().requires_grad_()
        atoms = len(positions)
        first, second = torch.triu_indices(atoms, atoms, offset=1)
        distances = (positions[first] - positions[second]).norm(dim=-1, keepdim=True)
        energy = self.pair(distances).sum()
        (slope,) = torch.autograd.grad(energy, positions, create_graph=True)
        return energy, -slope


def make_model() -> Potential:
    torch.manual_seed(0)
    return Potential()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),)
