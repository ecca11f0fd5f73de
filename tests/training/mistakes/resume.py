"""Models and optimizers that keep state which no ``state_dict`` has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests.training.mistakes.mistake import Mistake

WIDTH = 6


def rows() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return one input of four rows."""
    return (torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)),), {}


class Net(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Warming(Net):
    """Scales its output by the number of calls, which is a Python number; the twin keeps it in a buffer."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(wrong)
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        count = self.calls if self.wrong else self.count
        return super().forward(x) * (1 + 0.1 * count)


class Averaging(Net):
    """Centres its hidden values by a moving mean in a plain attribute; the twin has a buffer."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(wrong)
        if wrong:
            self.mean = torch.zeros(WIDTH)
        else:
            self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return self.second(hidden - self.mean)


class NonPersistent(Net):
    """A moving mean in a buffer that is not persistent."""

    def __init__(self, wrong: bool) -> None:
        super().__init__(wrong)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=not wrong)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return self.second(hidden - self.mean)


class Momentum(Optimizer):
    """Gradient descent with momentum, which is kept in an attribute, or in ``self.state``."""

    def __init__(self, parameters: Sequence[Tensor], wrong: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.wrong, self.kept = wrong, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.kept.setdefault(parameter, {}) if self.wrong else self.state[parameter]
                state["velocity"] = 0.9 * state.get("velocity", torch.zeros_like(parameter)) + parameter.grad
                parameter.sub_(group["lr"] * state["velocity"])


class StaleDecay(LambdaLR):
    """A scheduler of the weight decay that applies its schedule before it has loaded it."""

    def __init__(self, optimizer: Optimizer, wrong: bool) -> None:
        self.wrong, self.decay = wrong, 0.0
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, *args: Any) -> None:
        super().step(*args)
        self.decay = 0.5 * self.last_epoch
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.decay

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.wrong:
            self._apply()
        super().load_state_dict(state)
        if not self.wrong:
            self._apply()


def _made(model: type[nn.Module]) -> Any:
    def make(wrong: bool) -> nn.Module:
        torch.manual_seed(0)
        return model(wrong)

    return make


def _momentum(wrong: bool) -> Any:
    return lambda parameters: Momentum(parameters, wrong)


def _decay(wrong: bool) -> Any:
    def factory(parameters: Sequence[Tensor]) -> tuple[Optimizer, Any]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        return optimizer, StaleDecay(optimizer, wrong)

    return factory


# The first step after the half of four.
_RESUMED = 3
MISTAKES = [
    Mistake(
        "calls_in_python", "pytorch/pytorch 35047", "resume", _made(Warming), rows, cause="GC439", first_step=_RESUMED
    ),
    Mistake(
        "mean_in_an_attribute",
        "pytorch/pytorch 35047",
        "resume",
        _made(Averaging),
        rows,
        cause="GC439",
        first_step=_RESUMED,
    ),
    Mistake(
        "buffer_not_persistent",
        "pytorch/pytorch 35047",
        "resume",
        _made(NonPersistent),
        rows,
        cause="GC439",
        first_step=_RESUMED,
    ),
    Mistake(
        "momentum_in_an_attribute",
        "kohya-ss/sd-scripts 1344",
        "resume",
        _made(Net),
        rows,
        optimizer=_momentum,
        cause="GC439",
        first_step=_RESUMED,
    ),
    Mistake(
        "stale_weight_decay",
        "NVIDIA/Megatron-LM 7468",
        "resume",
        _made(Net),
        rows,
        optimizer=_decay,
        first_step=_RESUMED,
    ),
]
