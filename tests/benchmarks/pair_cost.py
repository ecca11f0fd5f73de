"""What ``gradctl compare REFERENCE CANDIDATE`` costs beside bare runs of the two, in one run.

    python tests/benchmarks/pair_cost.py [--keys N ...]

The bare side runs both programs forward and backward on as many inputs and calls as the comparison does: natively, and
in float64. Printed for attention of growing length (``sample_models/attention.py``), imports not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gradctl.commands.compare_candidate import compare_candidate
from gradctl.subject.loading.load import make_subject

sys.path.insert(0, str(Path(__file__).parents[2] / "sample_models"))
import attention  # type: ignore[import-not-found]

# Natively: two first runs of each, three calls of the example, three variations, without gradients, after the example
# (two calls), an expanded cotangent, eight random inputs. In float64: the reference on each input, the candidate on all
# but the random ones.
NATIVE_RUNS, REFERENCE_FLOAT64_RUNS, CANDIDATE_FLOAT64_RUNS = 20, 16, 10


def train(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Run a function forward and backward on leaves of a dtype."""
    leaves = [each.to(dtype, copy=True).requires_grad_() for each in inputs]
    output = function(*leaves)
    output.backward(torch.randn_like(output))


def bare(inputs: Sequence[Tensor]) -> float:
    """Return the seconds of the runs alone."""
    start = time.perf_counter()
    for function, runs in ((attention.reference, REFERENCE_FLOAT64_RUNS), (attention.fused, CANDIDATE_FLOAT64_RUNS)):
        for _ in range(NATIVE_RUNS):
            train(function, inputs, torch.float32)
        for _ in range(runs):
            train(function, inputs, torch.float64)
    return time.perf_counter() - start


def compared(inputs: Sequence[Tensor]) -> float:
    """Return the seconds of the comparison, which must pass."""
    start = time.perf_counter()
    unit = compare_candidate(make_subject(attention.reference, inputs), make_subject(attention.fused, inputs))
    assert unit.verdict == "pass", unit
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[24, 128, 512, 1024])
    for keys in parser.parse_args().keys:
        inputs = attention.example_inputs(batch=8, keys=keys)
        pairs = [(bare(inputs), compared(inputs)) for _ in range(4)][1:]  # the first warms up
        alone, both = (min(each) for each in zip(*pairs, strict=True))
        print(f"{keys:5} keys  bare {alone:6.2f} s  compare {both:6.2f} s  {both / alone:.2f}x")


if __name__ == "__main__":
    main()
