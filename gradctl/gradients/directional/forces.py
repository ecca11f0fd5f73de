"""GC425: a model that returns an energy and forces, whose forces are not minus the derivative of the energy.

The derivative is that of the energy as the model computes it, by finite differences in float64 along random directions:
nothing is held fixed, because a model that differentiates inside makes leaves of its positions (``detach``).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradctl.core.findings import Finding
from gradctl.numerics.ladder import noise_floor, slope_at_zero
from gradctl.numerics.measures import dot, gaussian_like, is_float, norm
from gradctl.numerics.runner import refusals_ignored
from gradctl.subject.instance import Instance, Leaf
from gradctl.subject.torch_private import patched
from gradctl.tracing.model_runner import ModelRunner

# Names of outputs and inputs, in lower case.
_ENERGIES = ("total_energy", "energy", "potential_energy")
_ENERGIES_OF_PARTS = ("energies",)  # of a batch, of atoms: their sum counts if there is no other energy
_FORCES = ("forces", "force")
_POSITIONS = ("positions", "position", "pos", "coordinates", "coords", "coord", "xyz")
_PROBES = 4
_LEAST_PROBES = 2
# A smaller disagreement is rounding of islands in float32, or a spline.
_SMALLEST = 1e-4


@dataclass(frozen=True, slots=True)
class _Probe:
    """One direction: the work of the forces along it, minus the derivative of the energy, and whether they agree."""

    work: float
    derivative: float
    agrees: bool


def force_findings(runner: ModelRunner, epsilon: float) -> list[Finding]:
    """Return GC425 if a model returns an energy and forces, and these are not minus the derivative of the energy.

    Rows of forces that are exactly zero are not judged, unless all are: padded and fixed atoms.

    Args:
        runner: the model in float64, its leaves at the point, which are restored.
        epsilon: machine epsilon of the dtype in which it runs.
    """
    with runner.instance.preserve_leaves():
        outputs = {name: t.detach().clone() for name, t in runner.differentiate() if is_float(t)}
        found = []
        for forces, energies in _pairs(list(outputs)):
            leaf = _positions(runner.leaves, outputs[forces])
            if leaf is None or not energies:
                continue
            probes = [_probe(runner, leaf, energy, outputs[forces], epsilon) for energy in energies]
            if all(map(_refute, probes)):
                found.append(_finding(forces, energies[0], leaf, probes[0], runner))
    return found


def _refute(probes: Sequence[_Probe]) -> bool:
    """Return whether most directions disagree: by chance one agrees with forces that are slightly wrong."""
    return len(probes) >= _LEAST_PROBES and 2 * sum(probe.agrees for probe in probes) < len(probes)


def _finding(forces: str, energy: str, leaf: Leaf, probes: Sequence[_Probe], runner: ModelRunner) -> Finding:
    # It loads Dynamo, and Dynamo triton, which few models need, and which reads its environment once.
    from gradctl.joint.inner_gradients import differentiates_inside

    said, is_multiple = _relation(probes)
    is_error = is_multiple or (differentiates_inside(runner.instance) and _are_derived(runner.instance, forces))
    head = "" if is_error else "; no derivative in the forward affects it, so this may be a direct head"
    return Finding(
        code="GC425",
        severity="error" if is_error else "warning",
        quantity="output",
        tensor=forces,
        message=f"{forces} is not minus the derivative of {energy} with respect to {leaf.name}: {said}{head}.",
        hint=f"compute forces = -torch.autograd.grad({energy.rpartition('.')[2]}.sum(), "
        f"{leaf.name.rpartition(':')[2]}, create_graph=True)[0]; forces with a head of their own are not "
        "conservative.",
        allow=f"GC425:{forces}",
    )


def _are_derived(instance: Instance, forces: str) -> bool:
    """Return whether the forces change if the gradients that the forward computes are doubled.

    True also if it computes them by another function than ``torch.autograd.grad``, or does not run with others.
    """
    grad, is_called, found = torch.autograd.grad, False, []

    def doubled(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        nonlocal is_called
        is_called = True
        return tuple(each if each is None else 2 * each for each in grad(*args, **kwargs))

    for function in (grad, doubled):
        instance.restore()
        args, kwargs = instance.inputs()
        with suppress(Exception), patched(torch.autograd, "grad", function), torch.enable_grad():
            outputs = dict(instance.call_as_seeded(instance.model, args, kwargs))
            found.append(outputs[forces].detach().clone())
    instance.restore()
    return not is_called or len(found) < 2 or not torch.equal(*found)  # both ran


def _pairs(outputs: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each output of forces with the energies that it may be derived from: those beside it, if there are any."""
    forces = _named(outputs, _FORCES)
    pairs = []
    for each in forces:
        beside = [name for name in outputs if name.rpartition(".")[0] == each.rpartition(".")[0]]
        scopes = (beside, outputs) if len(forces) == 1 else (beside,)
        found = (_named(scope, names) for scope in scopes for names in (_ENERGIES, _ENERGIES_OF_PARTS))
        pairs.append((each, next(filter(None, found), [])))
    return pairs


def _named(outputs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the outputs whose last name is one of ``names``, in the order of these."""
    return [each for name in names for each in outputs if each.rpartition(".")[2].lower() == name]


def _positions(leaves: Iterable[Leaf], forces: Tensor) -> Leaf | None:
    """Return the input that forces of this shape are the derivative by: by its name, or the only one of the shape."""
    alike = [leaf for leaf in leaves if leaf.name.startswith("input:") and leaf.tensor.shape == forces.shape]
    named = [leaf for leaf in alike if leaf.name.removeprefix("input:").rpartition(".")[2].lower() in _POSITIONS]
    return next((each[0] for each in (named, alike) if len(each) == 1), None)


def _probe(runner: ModelRunner, leaf: Leaf, energy: str, forces: Tensor, epsilon: float) -> list[_Probe]:
    """Return the probes whose finite differences resolve a derivative."""
    value = leaf.tensor.detach().clone()
    generator = torch.Generator().manual_seed(runner.instance.subject.seed)
    judged = (forces != 0).any(dim=-1, keepdim=True) if forces.ndim and bool(forces.any()) else torch.ones_like(forces)
    base = _energy_at(runner, leaf, value, energy)
    found = []
    for _ in range(_PROBES):
        direction = torch.where(judged.bool(), gaussian_like(value, generator), 0)
        direction = direction / (norm(direction) or 1.0)

        def phi(t: float, direction: Tensor = direction) -> float:
            with refusals_ignored():  # a branch, or a value outside of the domain
                return float((_energy_at(runner, leaf, value + t * direction, energy) - base).sum())
            return math.nan

        work = dot(forces.to(direction.dtype), direction)
        scale = max(abs(work), norm(forces) * _SMALLEST)
        slope = slope_at_zero(phi, noise_floor(phi), scale, epsilon, size=norm(base))
        if slope.resolved or slope.usable:
            allowed = 10 * slope.error + _SMALLEST * max(scale, abs(slope.derivative))
            found.append(_Probe(work, -slope.derivative, abs(work + slope.derivative) <= allowed))
    with torch.no_grad():
        leaf.tensor.copy_(value)
    return found


def _energy_at(runner: ModelRunner, leaf: Leaf, value: Tensor, energy: str) -> Tensor:
    with torch.no_grad():
        leaf.tensor.copy_(value)
    return dict(runner.differentiate())[energy].detach().clone()


def _relation(probes: Sequence[_Probe]) -> tuple[str, bool]:
    """Return how the forces differ from minus the derivative, and whether they are a multiple of it."""
    if not any(probe.work for probe in probes):
        return "they are zero", True
    ratios = [probe.work / probe.derivative for probe in probes if probe.derivative]
    factor = statistics.median(ratios) if ratios else 0.0
    residual = math.sqrt(sum((probe.work - factor * probe.derivative) ** 2 for probe in probes))
    size = math.sqrt(sum(probe.work**2 for probe in probes))
    if len(ratios) == len(probes) and residual <= 10 * _SMALLEST * size:
        sign = "the sign is wrong, they are plus the derivative" if math.isclose(factor, -1, rel_tol=1e-3) else ""
        return sign or f"they are scaled by {factor:.4g}", True
    differs = math.sqrt(sum((probe.work - probe.derivative) ** 2 for probe in probes))
    return f"they differ by {differs / size:.2e} of their size (relative)", False
