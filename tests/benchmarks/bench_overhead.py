"""How well two runs of ``gradctl bench`` agree, what the timing costs, and what ``torch.utils.benchmark`` measures.

    python tests/benchmarks/bench_overhead.py [TARGET...] [-- FORM...]

Printed for each form: the ratio to eager of two runs with their intervals, their difference, and whether it is below
5 % or the intervals overlap; and the time of the rounds outside of timed calls, divided by that inside of them.

Last, for each target, the median of a training step of eager by ``bench``, and by ``Timer.blocked_autorange`` of the
same step in one process, which includes the copies of inputs and the removal of gradients.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch.utils.benchmark import Timer

from gradctl.commands.bench import eager_step
from gradctl.comparison.timing import medians_of, rounds_of
from gradctl.core.target_options import TargetOptions
from gradctl.numerics.intervals import median_interval
from gradctl.subject.loading.load import load_subject

TARGETS = [f"sample_models/{name}.py" for name in ("mlp", "transformer", "resnet")]
FORMS = ["trace", "export"]


def costs(target, forms):
    """Return the measurement of each form in one run of the command."""
    options = [option for form in forms for option in ("--form", form)]
    command = [sys.executable, "-m", "gradctl", "bench", target, *options, "--format", "json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return {unit["form"]: unit["measurements"][0] for unit in json.loads(finished.stdout)["units"]}


def print_runs(target, forms):
    """Print how two runs agree on each form."""
    first, second = costs(target, forms), costs(target, forms)
    for form in forms:
        one, two = (run[form]["training_ratio"] or run[form]["forward_ratio"] for run in (first, second))
        difference = abs(one["median"] / two["median"] - 1)
        overlap = one["lower"] <= two["upper"] and two["lower"] <= one["upper"]
        said = "within 5 %" if difference < 0.05 else "intervals overlap" if overlap else "DIFFERENT"
        spent = sum(run[form]["seconds_timing"] for run in (first, second))
        measured = sum(run[form]["seconds_measured"] for run in (first, second))
        shown = [f"{each['median']:.3f} [{each['lower']:.3f}, {each['upper']:.3f}]" for each in (one, two)]
        overhead = spent / measured - 1
        print(f"{target:<32}{form:<9}{shown[0]:<24}{shown[1]:<24}{difference:>7.1%}  {said:<18}{overhead:>8.1%}")


def print_eager(target):
    """Print the median of a training step of eager by both timers."""
    step = eager_step(load_subject(TargetOptions(target)), has_gradients=True)
    (blocks,) = rounds_of([step], fewest=6, most=40, seconds=2.0, block_seconds=0.1, seed=0)
    own, lower, upper = median_interval(medians_of(blocks, "training"))
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    torchs = timer.blocked_autorange(min_run_time=2.0)
    print(
        f"{target:<32}bench {own * 1e6:.0f} us [{lower * 1e6:.0f}, {upper * 1e6:.0f}]   "
        f"torch.utils.benchmark {torchs.median * 1e6:.0f} us (IQR {torchs.iqr * 1e6:.0f})   {own / torchs.median:.3f}x"
    )


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    targets, forms = arguments[:split] or TARGETS, arguments[split + 1 :] or FORMS
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'target':<32}{'form':<9}{'first run':<24}{'second run':<24}{'differ':>7}  {'':<18}{'overhead':>8}")
    for target in targets:
        print_runs(target, forms)
    for target in targets:
        print_eager(target)


if __name__ == "__main__":
    main()
