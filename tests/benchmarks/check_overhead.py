"""What `gradctl check` costs over bare processes that do the same work, in one run.

    python tests/benchmarks/check_overhead.py [--units 100] [--jobs 2]

A unit is the gradcheck of a small model. Bare: a process each that imports gradctl, loads the target, checks it and
prints the verdict; as many at a time. Both take turns, ten units at a time, so that a machine that gets slower slows
both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradctl.core.target_options import TargetOptions
from gradctl.isolation.protocol import UnitRequest
from gradctl.isolation.units import run_units

MODEL = str(Path(__file__).parents[2] / "sample_models" / "linear.py")
BARE = """
import sys
from gradctl.gradients.gradcheck import gradcheck
from gradctl.subject.loading.load import load_subject
print(gradcheck(load_subject(TargetOptions(sys.argv[1]))).verdict)
"""
AT_A_TIME = 10


def bare(count: int, jobs: int) -> float:
    """Return the seconds of bare processes."""

    def one(_: int) -> None:
        said = subprocess.run([sys.executable, "-c", BARE, MODEL], capture_output=True, text=True, check=True).stdout
        assert said == "pass\n", said

    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(count)))
    return time.perf_counter() - start


def units(count: int, jobs: int) -> float:
    """Return the seconds of as many units."""
    request = UnitRequest(checking=TargetOptions(MODEL))
    start = time.perf_counter()
    found = run_units([request] * count, jobs=jobs)
    seconds = time.perf_counter() - start
    assert [unit.verdict for unit in found] == ["pass"] * count
    return seconds


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    bare_seconds = unit_seconds = 0.0
    for first in range(0, options.units, AT_A_TIME):
        count = min(AT_A_TIME, options.units - first)
        bare_seconds += bare(count, options.jobs)
        unit_seconds += units(count, options.jobs)
    print(f"{options.units} units, {options.jobs} at a time: bare {bare_seconds:.1f} s, units {unit_seconds:.1f} s")
    print(f"ratio {unit_seconds / bare_seconds:.3f}")


if __name__ == "__main__":
    main()
