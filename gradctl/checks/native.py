"""The user's own model in its own dtype, first of all: does it run, does it repeat itself, is it finite?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.core.findings import Finding, TensorResult, number
from gradctl.numerics.measures import gaussian_like, relative_error
from gradctl.numerics.point import NoGradient
from gradctl.subject.frames import first_line, is_out_of_memory, user_frames
from gradctl.subject.instance import InputMode, Instance
from gradctl.subject.subject import Subject

__all__ = ["Native", "run_native"]

Named = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """Two seeded runs of the user's model, forward and backward.

    Attributes:
        input_mode: how float inputs can be given to this model.
        outputs: float outputs of the first run.
        gradients: by leaf; None where autograd gives none.
        unequal: outputs and gradients that differ between the two runs, with the relative error.
    """

    input_mode: InputMode
    outputs: dict[str, Tensor]
    gradients: Named
    unequal: dict[str, float]

    def findings(self) -> list[Finding]:
        """Return what is wrong with the model whatever its gradients are: NaN, and results that do not repeat."""
        found = [_not_finite(name, value) for name, value in self.outputs.items() if _is_nan(value)]
        if self.unequal:
            name, error = max(self.unequal.items(), key=lambda item: item[1])
            found.append(
                Finding(
                    code="GC412",
                    severity="warning",
                    verdict="nondeterministic",
                    quantity="gradient" if name in self.gradients else "output",
                    tensor=name,
                    message=f"two runs from the same seed differ: {len(self.unequal)} of "
                    f"{len(self.outputs) + len(self.gradients)} tensors, {name} by {error:.2e} (relative); "
                    "nothing can be judged.",
                    hint="draw from torch's, numpy's or python's global generator, or keep the generator in the model.",
                )
            )
        return found

    def results(self) -> list[TensorResult]:
        """Return a result for each tensor that does not repeat."""
        tensors = {**self.outputs, **self.gradients}
        return [
            TensorResult(
                quantity="gradient" if name in self.gradients else "output",
                tensor=name,
                verdict="nondeterministic",
                shape=tuple(value.shape) if (value := tensors[name]) is not None else (),
                dtype=str(value.dtype).removeprefix("torch.") if value is not None else "none",
                error=number(error),
            )
            for name, error in self.unequal.items()
        ]


def run_native(subject: Subject) -> Native:
    """Return two runs of the model as it is.

    Inputs are given as leaves that ask for a gradient where the model takes that, else as clones of leaves (it changes
    them in place), else as constants (it turns them to numpy, say).

    Raises:
        TargetError: GC111 the model raises, GC113 the loss is no scalar, GC114 no tensor comes out.
        NothingToCheck: GC110 no differentiable leaf or output.
    """
    instance, outputs, gradients = _first_run(subject)
    again_outputs, again_gradients = _run(instance, subject)
    unequal = {}
    for name, first, second in [
        *((name, value, again_outputs.get(name)) for name, value in outputs.items()),
        *((name, value, again_gradients.get(name)) for name, value in gradients.items()),
    ]:
        error = _difference(first, second)
        if first is not None and error > 1e3 * torch.finfo(first.dtype).eps:
            unequal[name] = error
    return Native(instance.input_mode, outputs, gradients, unequal)


def _first_run(subject: Subject) -> tuple[Instance, dict[str, Tensor], Named]:
    failures: list[Exception] = []
    modes: tuple[InputMode, ...] = ("leaf", "clone", "constant")
    for mode in modes:
        if mode == "clone" and "leaf Variable that requires grad" not in str(failures[0]):
            continue
        instance = Instance(subject, input_mode=mode)
        if not instance.leaves:
            if failures:
                break
            raise NothingToCheck(
                "GC110",
                f"{subject.target} has no differentiable leaf: no trainable parameter and no float input. "
                "Give it a float input, or unfreeze a parameter.",
            )
        try:
            return instance, *_run(instance, subject)
        except NoGradient as error:
            raise NothingToCheck(
                "GC110",
                f"no output of {subject.target} has a gradient: each is an integer, a constant, or cut from every leaf "
                "(detach, no_grad). There is nothing to check.",
            ) from error
        except TargetError:
            raise
        except Exception as error:  # the user's model may raise anything
            if is_out_of_memory(error):
                raise
            failures.append(error)
    last = failures[-1]
    raise TargetError(
        "GC111", f"{subject.target} raises on these inputs: {first_line(last)}.", details=user_frames(last)
    ) from last


def _run(instance: Instance, subject: Subject) -> tuple[dict[str, Tensor], Named]:
    """Return outputs and gradients of one run with unit Gaussian cotangents."""
    with torch.enable_grad():
        outputs = {name: t for name, t in instance.run() if t.is_floating_point() or t.is_complex()}
    if subject.loss is not None and any(t.numel() != 1 for t in outputs.values()):
        shape = list(next(iter(outputs.values())).shape)
        raise TargetError(
            "GC113", f"the loss returns a tensor of shape {shape}, not a scalar; end it in a sum or mean."
        )
    differentiable = [t for t in outputs.values() if t.requires_grad]
    if not differentiable:
        raise NoGradient
    generator = torch.Generator().manual_seed(subject.seed)
    cotangents = [gaussian_like(t, generator) for t in differentiable]
    torch.autograd.backward(differentiable, cotangents)
    return {name: t.detach() for name, t in outputs.items()}, {
        leaf.name: leaf.take_gradient() for leaf in instance.leaves
    }


def _difference(first: Tensor | None, second: Tensor | None) -> float:
    if first is None or second is None:
        return 0.0 if first is second else float("inf")
    return relative_error(first, second)


def _is_nan(value: Tensor) -> bool:
    return bool(torch.isnan(value).any()) or (not bool(torch.isfinite(value).any()) and value.numel() > 0)


def _not_finite(name: str, value: Tensor) -> Finding:
    bad = int((~torch.isfinite(value)).sum())
    return Finding(
        code="GC407",
        severity="error",
        quantity="output",
        tensor=name,
        verdict="reference-wrong",
        message=f"{name} is NaN or infinite in {bad} of {value.numel()} elements; its gradient means nothing there.",
        hint="look for 0/0, log or sqrt of a negative number, or an overflow on these inputs.",
        allow=f"GC407:{name}",
    )
