"""What `gradctl gradcheck` costs beside `torch.autograd.gradcheck`, from 1e3 to 1e7 parameters, in one run.

    python tests/benchmarks/gradcheck_cost.py [--largest 7]

torch's gradcheck takes two forwards an input element: it is run whole at 1e3 parameters, and at every size its time is
two float64 forwards (measured, the median of 9) times the number of parameters. Each size runs in a process of its own,
so that its peak memory is its own; "copies" counts float64 copies of the parameters above what the model itself,
loaded and run forward and backward once, has taken.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 8


def mlp(parameters: int):
    """Return an MLP of two square hidden layers with about this many parameters, and its input."""
    import torch
    from torch import nn

    width = max(4, round((parameters / 2) ** 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    return model, torch.randn(BATCH, width)


def peak_megabytes() -> float:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_megabytes() -> float:
    """Return the resident size of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def one_size(parameters: int) -> None:
    """Print one row of the table."""
    import torch

    from gradctl.gradients.gradcheck import gradcheck
    from gradctl.subject.subject import Subject

    model, x = mlp(parameters)
    count = sum(p.numel() for p in model.parameters())
    model(x).sum().backward()
    warm_up, row = mlp(100)
    gradcheck(Subject(target="warm-up", model=warm_up, args=(row,)))  # what torch imports on first use is no copy
    before = resident_megabytes()
    unit = gradcheck(Subject(target="mlp", model=model, args=(x,)))
    copies = (peak_megabytes() - before) / (count * 8 / 2**20)
    assert unit.verdict == "pass" and unit.oracle is not None
    missed = unit.oracle.missed_with_probability
    wide = mlp(parameters)[0].double()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        wide(x.double())
        seconds.append(time.perf_counter() - start)
    forward = statistics.median(seconds)
    theirs, measured = 2 * count * forward, "extrapolated"
    if count < 3000:
        names = [name for name, _ in wide.named_parameters()]
        leaves = tuple(p.detach().clone().requires_grad_() for p in wide.parameters())
        start = time.perf_counter()
        assert torch.autograd.gradcheck(
            lambda *tensors: torch.func.functional_call(wide, dict(zip(names, tensors, strict=True)), x.double()),
            leaves,
        )
        theirs, measured = time.perf_counter() - start, "measured"
    print(
        f"{count:>9} {unit.oracle.forwards:>9} {unit.seconds:>9.2f} s {forward * 1e3:>9.2f} ms {theirs:>11.4g} s "
        f"{measured:<12} {theirs / unit.seconds:>9.0f} x {copies:>7.1f} {missed:>9.0e}",
        flush=True,
    )


def main() -> None:
    """Print the table, one process a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=7, help="power of ten of the largest model")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        one_size(options.one)
        return
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, tanh MLP")
    print(
        f"{'params':>9} {'forwards':>9} {'gradctl':>11} {'forward':>12} {'torch.gradcheck':>13} {'':<12} {'ratio':>11} "
        f"{'copies':>7} {'missed 1%':>9}"
    )
    for power in range(3, options.largest + 1):
        subprocess.run([sys.executable, __file__, "--one", str(10**power)], check=True)


if __name__ == "__main__":
    main()
