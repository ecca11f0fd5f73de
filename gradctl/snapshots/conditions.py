"""The conditions of a run: versions, threads, CPU capability, and what random generators yield from a seed."""

from __future__ import annotations

import platform
import random
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gradctl import __version__
from gradctl.snapshots.tensor_records import digest

# Recorded if the model has imported them.
_PACKAGES = ("triton", "transformers", "timm")
_NONE = "none"


def environment() -> dict[str, str | int]:
    """Return the versions and settings that can change a result."""
    found = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in _PACKAGES if name in sys.modules}
    return {
        "gradctl": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        **found,
        "machine": platform.machine(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


def generators(seed: int) -> dict[str, str]:
    """Return a digest of the numbers that each generator yields from a seed; none of the global ones is used."""
    generator = torch.Generator()
    drawn = {
        "python random": torch.tensor([random.Random(seed).random()], dtype=torch.float64),
        "numpy.random": torch.from_numpy(np.random.RandomState(seed % 2**32).standard_normal(8)),
    }
    of_torch: dict[str, Callable[[], Tensor]] = {
        "uniform_": lambda: torch.empty(64).uniform_(-0.1, 0.3, generator=generator),
        "randn": lambda: torch.randn(64, generator=generator),
        "orthogonal_": lambda: torch.nn.init.orthogonal_(torch.empty(256, 256), generator=generator),
    }
    for name, draw in of_torch.items():
        generator.manual_seed(seed)
        drawn[name] = draw()
    return {name: digest(each)[:8] for name, each in drawn.items()}


def changed_conditions(before: Mapping[str, str | int], now: Mapping[str, str | int]) -> list[str]:
    """Return ``torch 2.13.0 -> 2.14.1`` for each condition that differs."""
    names = list(dict.fromkeys([*before, *now]))
    return [
        f"{name} {before.get(name, _NONE)} -> {now.get(name, _NONE)}"
        for name in names
        if before.get(name) != now.get(name)
    ]
