"""The update of SGD, Adam and AdamW as a function of tensors: what ``torch.optim`` does in one step, for a graph.

The formulas are those of ``torch.optim`` (``_single_tensor_sgd``, ``_single_tensor_adam``), of Adam with fewer
operations on whole tensors; rounding is nearly the same. The bias corrections of Adam are computed in float64, as
Python computes them there: in float32, ``1 - 0.999 ** step`` is off by 6e-5 at the first step.

Inputs beside the parameters: ``step``, how many steps were made; ``learning_rate`` of the first group, to which the
others are proportional; the state, ``exp_avg.fc1.weight``. Outputs: ``next.fc1.weight``, ``next.exp_avg.fc1.weight``,
``next.step``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from gradctl.joint.export_error import JointExportError

STEP, LEARNING_RATE, NEXT = "step", "learning_rate", "next."
_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Parameters with common hyperparameters: names, and the options of ``torch.optim``."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerUpdate:
    """One step of an optimizer.

    Attributes:
        loss: name of the output that is minimised, a scalar.
        is_adam: whether the rule is that of Adam and AdamW; if not, that of SGD.
        groups: of the parameters that have a gradient.
        clip_norm: the largest norm of all gradients together; None: they are not clipped.
        keeps_gradients: whether the gradients are outputs, too.
    """

    loss: str
    is_adam: bool
    groups: Sequence[Group]
    clip_norm: float | None = None
    keeps_gradients: bool = False

    @classmethod
    def of(cls, optimizer: Optimizer, names: Mapping[int, str], loss: str, **attributes: Any) -> OptimizerUpdate:
        """Return the update of an optimizer.

        Args:
            optimizer: of ``torch.optim``.
            names: of the parameters that have a gradient, by identity; torch updates no others.
            loss, attributes: see the attributes.

        Raises:
            JointExportError: it is not SGD, Adam or AdamW.
        """
        # A class derived from these may do anything in its step; AdamW itself is derived from Adam.
        if type(optimizer) not in (SGD, Adam, torch.optim.AdamW):
            raise JointExportError(f"the optimizer {type(optimizer).__name__} has no graph: use SGD, Adam or AdamW.")
        groups = [
            Group(tuple(names[id(each)] for each in group["params"] if id(each) in names), _plain(group))
            for group in optimizer.param_groups
        ]
        return cls(loss, isinstance(optimizer, Adam), [group for group in groups if group.names], **attributes)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first group."""
        return float(self.groups[0].options["lr"])

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first step, and the learning rate, by name; scalars have no axes."""
        found: dict[str, Tensor] = {
            f"{key}.{name}": torch.zeros_like(parameters[name], memory_format=torch.contiguous_format)
            for group in self.groups
            for name in group.names
            for key in self._keys(group)
        }
        dtype = next((parameters[name].dtype for group in self.groups for name in group.names), torch.float32)
        return {STEP: torch.tensor(0), LEARNING_RATE: torch.tensor(self.learning_rate, dtype=dtype), **found}

    def __call__(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the next parameters and the next state by name, ``next.fc1.weight``, for clipped gradients."""
        step = state[STEP] + 1
        found = {}
        for group in self.groups:
            ratio = float(group.options["lr"]) / self.learning_rate if self.learning_rate else 1.0
            rate = state[LEARNING_RATE] * ratio if ratio != 1 else state[LEARNING_RATE]
            # Once for all parameters of a dtype: to trace an operation takes milliseconds.
            dtypes = {parameters[name].dtype for name in group.names}
            scalars = {dtype: _scalars(step, rate, group.options, dtype, is_adam=self.is_adam) for dtype in dtypes}
            for name in group.names:
                own = {key: state[f"{key}.{name}"] for key in self._keys(group)}
                gradient = -gradients[name] if group.options["maximize"] else gradients[name]
                update = _adam if self.is_adam else _sgd
                parameter, now = update(parameters[name], gradient, own, scalars[parameters[name].dtype])
                found[f"{NEXT}{name}"] = parameter
                found |= {f"{NEXT}{key}.{name}": each for key, each in now.items()}
        return {**found, f"{NEXT}{STEP}": step}

    def clip(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gradients as ``torch.nn.utils.clip_grad_norm_`` leaves them; as they are without ``clip_norm``."""
        if self.clip_norm is None:
            return gradients
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients.values()]))
        factor = torch.clamp(self.clip_norm / (total + _CLIP_EPSILON), max=1.0)
        return {name: each * factor.to(each.dtype) for name, each in gradients.items()}

    def _keys(self, group: Group) -> tuple[str, ...]:
        if not self.is_adam:
            return ("momentum_buffer",) if group.options["momentum"] else ()
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.options["amsgrad"] else []))


@dataclass(frozen=True, slots=True, eq=False)
class _Scalars:
    """What the parameters of a group and a dtype have in common.

    Attributes:
        options: hyperparameters.
        is_first: whether this is the first step.
        rate: learning rate; of Adam with its bias corrections.
        kept: the part of a parameter that decoupled weight decay keeps; None without it.
        epsilon: of Adam, with its bias correction; else 0.
    """

    options: Mapping[str, Any]
    is_first: Tensor
    rate: Tensor
    kept: Tensor | None = None
    epsilon: Tensor | float = 0.0


def _scalars(step: Tensor, rate: Tensor, options: Mapping[str, Any], dtype: torch.dtype, *, is_adam: bool) -> _Scalars:
    """Return what is common to a group, for the step with this number, from 1."""
    is_first = step == 1
    if not is_adam:
        return _Scalars(options, is_first, rate)
    beta1, beta2 = map(float, options["betas"])
    steps = step.to(torch.float64)
    correction = (1 - _power(beta2, steps)).sqrt()
    corrected = rate.to(torch.float64) / (1 - _power(beta1, steps)) * correction
    decay = options["weight_decay"] if options["decoupled_weight_decay"] else 0
    kept = 1 - rate * decay if decay else None
    return _Scalars(options, is_first, corrected.to(dtype), kept, (correction * options["eps"]).to(dtype))


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group as numbers: a learning rate may be a tensor."""
    options = {key: value for key, value in group.items() if key != "params"}
    return {key: float(value) if isinstance(value, Tensor) else value for key, value in options.items()}


def _sgd(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], scalars: _Scalars
) -> tuple[Tensor, dict[str, Tensor]]:
    options = scalars.options
    if options["weight_decay"]:
        gradient = gradient.add(parameter, alpha=options["weight_decay"])
    now = {}
    if options["momentum"]:
        buffer = state["momentum_buffer"] * options["momentum"] + gradient * (1 - options["dampening"])
        if options["dampening"]:  # the first gradient is not dampened
            buffer = torch.where(scalars.is_first, gradient, buffer)
        now = {"momentum_buffer": buffer}
        gradient = gradient + buffer * options["momentum"] if options["nesterov"] else buffer
    return parameter - scalars.rate * gradient, now


def _adam(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], scalars: _Scalars
) -> tuple[Tensor, dict[str, Tensor]]:
    options = scalars.options
    beta1, beta2 = map(float, options["betas"])
    if scalars.kept is not None:
        parameter = parameter * scalars.kept
    elif options["weight_decay"]:
        gradient = gradient.add(parameter, alpha=options["weight_decay"])
    # 12 operations on whole tensors, which take the time of the update: onnxruntime multiplies by ``root`` in the
    # MatMul that computes the gradient, and the bias corrections are applied to scalars only.
    root = math.sqrt(1 - beta2)
    scaled = gradient * root
    first = state["exp_avg"] * beta1 + scaled * ((1 - beta1) / root)
    second = state["exp_avg_sq"] * beta2 + scaled * scaled
    now = {"exp_avg": first, "exp_avg_sq": second}
    if options["amsgrad"]:
        now["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    largest = now["max_exp_avg_sq"] if options["amsgrad"] else second
    return parameter - scalars.rate * (first / (largest.sqrt() + scalars.epsilon)), now


def _power(base: float, exponent: Tensor) -> Tensor:
    """Return a power in float64: torch.onnx converts the base of ``base ** exponent`` to float32 (torch 2.13)."""
    return (exponent * math.log(base)).exp() if base else torch.zeros_like(exponent)
