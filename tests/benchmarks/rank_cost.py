"""What a comparison of ranks costs: ``gradctl compare --form F`` beside a script that does the same by hand with
``torch.multiprocessing``: N processes, one step in float64, gradients gathered and compared with one process.

``python -m tests.benchmarks.rank_cost [FORM …]`` prints seconds, those of the processor, and the ratios.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time

SAMPLE = "sample_models/transformer.py"
FORMS = ("ddp:2", "fsdp:2", "tp:4")
BARE = """
import sys, tempfile, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.tensor import DTensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from sample_models import transformer

def rank_main(rank, kind, world, path, reference, cotangent):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    model, (ids,) = transformer.make_model().double(), transformer.example_inputs()
    if kind == "tp":
        styles = {"linear1": ColwiseParallel, "linear2": RowwiseParallel}
        plan = {f"layers.layers.{n}.{name}": style() for n in (0, 1) for name, style in styles.items()}
        model = parallelize_module(model, mesh, plan)
    else:
        ids, cotangent = ids.chunk(world)[rank], cotangent.chunk(world)[rank] * world
        if kind == "fsdp":
            for layer in model.layers.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
    model(ids).backward(cotangent)
    for name, parameter in model.named_parameters():
        gradient, own = parameter.grad, reference[name.removeprefix("module.")]
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        assert (gradient - own).norm() <= 1e-12 * own.norm() + 1e-13, name
    dist.destroy_process_group()

if __name__ == "__main__":
    kind, world = sys.argv[1].split(":")
    model, (ids,) = transformer.make_model().double(), transformer.example_inputs()
    out = model(ids)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    reference = {name: each.grad for name, each in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (kind, int(world), f"{folder}/store", reference, cotangent), nprocs=int(world))
"""


def cost_of(command: list[str]) -> tuple[float, float]:
    """Return the seconds that a command runs, which must succeed, and those of the processor that it uses."""
    environment = {**os.environ, "PYTHONPATH": ".", "GLOO_SOCKET_IFNAME": "lo"}
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main(forms: list[str]) -> None:
    """Print a line for each form."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(BARE)
        script.flush()
        for form in forms or FORMS:
            command = [sys.executable, "-m", "gradctl", "compare", SAMPLE, "--form", form]
            (own, own_used), (bare, bare_used) = cost_of(command), cost_of([sys.executable, script.name, form])
            print(
                f"{form:7} gradctl {own:.1f} s (processor {own_used:.1f} s)  bare processes {bare:.1f} s "
                f"({bare_used:.1f} s)  ratio {own / bare:.2f} ({own_used / bare_used:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
