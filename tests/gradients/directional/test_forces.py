"""GC425: forces that are not minus the derivative of the energy are found and named; right ones are silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gradctl.commands.compare import compare
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.subject import Subject

pytestmark = pytest.mark.fast


class Named(NamedTuple):
    total_energy: Tensor
    force: Tensor


@dataclass
class Fields:
    energies: Tensor
    forces: Tensor


class Halved(torch.autograd.Function):
    """A pair distance whose backward lacks the part of the second atom (nequip 610: a wrong kernel)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a - b).norm(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b = ctx.saved_tensors
        unit = (a - b) / (a - b).norm(dim=-1, keepdim=True) * gradient
        return unit, 0 * unit


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=-1, keepdim=True)


def as_dict(energy: Tensor, forces: Tensor) -> dict[str, Tensor]:
    return {"energy": energy, "forces": forces}


class Potential(nn.Module):
    """Pairs of atoms; ``of`` makes forces of the derivative, ``returns`` the outputs of both."""

    def __init__(
        self,
        of: Callable[[Tensor, Tensor], Tensor] = lambda slope, _: -slope,
        returns: Callable[[Tensor, Tensor], Any] = as_dict,
        between: Callable[[Tensor, Tensor], Tensor] = distance,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pair = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.of, self.returns, self.between = of, returns, between

    def energies(self, positions: Tensor) -> Tensor:
        first, second = torch.triu_indices(positions.shape[-2], positions.shape[-2], offset=1)
        return self.pair(self.between(positions[..., first, :], positions[..., second, :])).sum(dim=(-1, -2))

    def forward(self, positions: Tensor) -> Any:
        positions = positions if positions.requires_grad else positions.clone().requires_grad_()
        energy = self.energies(positions)
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return self.returns(energy, self.of(slope, positions))


class Detached(Potential):
    """It makes a leaf of its positions, as at inference."""

    def forward(self, positions: Tensor) -> Any:
        return super().forward(positions.detach().requires_grad_())


class Direct(Potential):
    """Forces by a head of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, positions: Tensor) -> Any:
        return as_dict(self.energies(positions), self.head(positions))


class Spring(nn.Module):
    """Forces by a formula, not by autograd."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.stiffness, self.constant = nn.Parameter(torch.ones(3)), constant

    def forward(self, pos: Tensor, velocities: Tensor) -> Any:
        forces = -self.constant * self.stiffness * pos + 0 * velocities
        return as_dict((0.5 * self.stiffness * pos**2).sum() + 0 * velocities.sum(), forces)


MASK = torch.tensor([1.0, 1, 1, 0, 0])[:, None]


def points(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(model: nn.Module, *args: Tensor) -> list[tuple[str, str]]:
    unit = gradcheck(Subject(target="net.py:model", model=model, args=args or (points(5, 3),)))
    return [(each.severity, each.message) for each in unit.findings if each.code == "GC425"]


SILENT = {
    "minus the derivative": Potential(),
    "in a named tuple": Potential(returns=Named),
    "in a dataclass": Potential(returns=Fields),
    "of padded atoms masked to zero": Potential(of=lambda slope, _: -slope * MASK),
    "with a leaf of its own": Detached(),
    "of no name": Potential(of=lambda slope, _: slope, returns=lambda energy, forces: (energy, forces)),
    "in float32 inside": Potential(between=lambda a, b: distance(a.float(), b.float()).to(a.dtype)),
}


def pair(scale: float) -> Callable[[Tensor, Tensor], Any]:
    """Two heads, of which the first has forces that are scaled."""
    return lambda energy, forces: {"a": as_dict(energy, scale * forces), "b": as_dict(2 * energy, 2 * forces)}


def test_each_head_has_its_own_pair():
    assert found(Potential(returns=pair(1.0))) == []
    ((_, message),) = found(Potential(returns=pair(-1.0)))
    assert message.startswith("output.a.forces is not minus the derivative of output.a.energy")


def energies_beside(scale: float) -> Callable[[Tensor, Tensor], Any]:
    return lambda energy, forces: as_dict(energy, scale * forces) | {"total_energy": 3 * energy}


def test_the_derivative_of_one_of_several_energies_is_enough():
    assert found(Potential(returns=energies_beside(1.0))) == []
    assert found(Potential(returns=energies_beside(3.0))) == []
    assert len(found(Potential(returns=energies_beside(2.0)))) == 1


def test_a_small_error_of_one_atom_is_found_though_a_direction_agrees_by_chance():
    off = torch.ones(8, 1)
    off[2] += 0.003
    wrong = Potential(of=lambda slope, _: -slope * off)
    assert all(found(wrong, points(8, 3, seed=seed)) for seed in (2, 8))


@pytest.mark.parametrize("name", SILENT)
def test_right_forces_are_silent(name):
    assert found(SILENT[name]) == []


def test_energies_of_a_batch_are_summed():
    assert found(Potential(), points(2, 4, 3)) == []
    assert found(Potential(of=lambda slope, _: -slope / 2), points(2, 4, 3)) != []


def test_a_formula_that_is_right_is_silent_and_the_input_is_that_of_its_name():
    assert found(Spring(1.0), points(4, 3), points(4, 3, seed=2)) == []


WRONG = {
    "the sign is wrong": Potential(of=lambda slope, _: slope),
    "they are scaled by 0.5": Potential(of=lambda slope, _: -slope / 2),
    "they are scaled by 1.01": Potential(returns=Named, of=lambda slope, _: -slope * 1.01),
    "they are zero": Potential(of=lambda slope, _: 0 * slope),
    "they differ by": Potential(between=Halved.apply),
    "of their size": Potential(of=lambda slope, x: -slope * (1 + 0.1 * x)),
    "plus the derivative": Detached(of=lambda slope, _: slope),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_forces_are_named(said):
    ((severity, message),) = found(WRONG[said])
    assert severity == "error"
    assert said in message
    assert message.split(":")[0].endswith("with respect to input")


def test_a_formula_that_is_a_multiple_is_an_error():
    ((severity, message),) = found(Spring(2.0), points(4, 3), points(4, 3, seed=2))
    assert (severity, "they are scaled by 2" in message) == ("error", True)


def test_a_direct_head_is_a_warning():
    ((severity, message),) = found(Direct())
    assert severity == "warning"
    assert "this may be a direct head" in message


def test_a_direct_head_beside_a_stress_that_is_derived_is_a_warning():
    class WithStress(Direct):
        def forward(self, positions):
            strain = torch.zeros(3, 3, dtype=positions.dtype, requires_grad=True)
            found = super().forward(positions @ (torch.eye(3, dtype=positions.dtype) + strain))
            return {**found, "stress": torch.autograd.grad(found["energy"].sum(), strain, create_graph=True)[0]}

    ((severity, message),) = found(WithStress())
    assert severity == "warning"
    assert "this may be a direct head" in message


def test_it_is_accepted_by_name():
    unit = gradcheck(
        Subject(target="net.py:model", model=WRONG["the sign is wrong"], args=(points(5, 3),)),
        allows=("GC425:output.forces",),
    )
    assert unit.verdict == "pass"


def test_compare_reports_it_in_the_unit_of_eager():
    subject = Subject(target="net.py:model", model=WRONG["the sign is wrong"], args=(points(5, 3),))
    (eager,) = compare(subject, forms=())
    assert [each.code for each in eager.findings if each.severity == "error"] == ["GC425"]
