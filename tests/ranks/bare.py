"""The targets of this folder in bare torch, in float64: two processes on gloo, and one that has the whole batch.

    python -m tests.ranks.bare [NAME…]

prints, for each mistake and its right twin, the parameter with the largest relative error of the gradient, and the
error: the oracle that the mistakes are mistakes, without any code of gradctl.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

WORLD = 2
NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef parallelize" in path.read_text())


def errors(names: list[str]) -> dict[tuple[str, bool], tuple[str, float]]:
    """Return the worst parameter and its relative error over the ranks, by target and whether it is the mistake."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder, names), WORLD)
        return torch.load(Path(folder) / "errors.pt")


def _work(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {(name, wrong): _error(name, wrong, rank, mesh) for name in names for wrong in (True, False)}
    if rank == 0:
        torch.save(found, Path(folder) / "errors.pt")
    dist.destroy_process_group()


def _error(name: str, wrong: bool, rank: int, mesh: Any) -> tuple[str, float]:
    target = importlib.import_module(f"tests.ranks.{name}")
    expected = _gradients(_model(target, wrong), _inputs(target))
    model = _model(target, wrong)
    split = getattr(target, "shard_inputs", lambda inputs, r, world: tuple(x.chunk(world)[r] for x in inputs))
    try:
        found = _gradients(target.parallelize(model, mesh), split(_inputs(target), rank, WORLD))
    except Exception as error:
        raise RuntimeError(f"{name}, {wrong=}") from error
    gathered: list[dict[str, Tensor]] = [{} for _ in range(WORLD)]
    dist.all_gather_object(gathered, found)
    worst = ("", 0.0)
    for key, reference in expected.items():
        held = [each[key] for each in gathered if key in each]
        if held[0].shape != reference.shape:
            axis = next(i for i, (a, b) in enumerate(zip(held[0].shape, reference.shape, strict=True)) if a != b)
            held = [torch.cat(held, axis)]
        error = max(float((each - reference).norm() / reference.norm()) for each in held)
        worst = max(worst, (key, error), key=lambda each: each[1])
    return worst


def _model(target: Any, wrong: bool) -> nn.Module:
    torch.manual_seed(0)
    model = target.make_model(wrong).double()
    model.wrong = wrong
    return model


def _inputs(target: Any) -> tuple[Tensor, ...]:
    return tuple(each.double() if each.is_floating_point() else each for each in target.example_inputs())


def _gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model(*inputs).backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        own = name.replace("module.", "")
        found["embed.weight" if own == "head.weight" and getattr(model, "stage", None) == 1 else own] = full
    return found


if __name__ == "__main__":
    for (name, wrong), (parameter, error) in errors(sys.argv[1:] or NAMES).items():
        print(f"{name:26} {'mistake' if wrong else 'right':8} {parameter:20} {error:.1e}")
