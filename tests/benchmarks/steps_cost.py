"""What ``gradctl compare --steps`` costs beside bare runs of the plain step and the variant, natively and in float64.

    python tests/benchmarks/steps_cost.py [STEPS] [TARGET...]

The bare runs have no noise, no copies of what they compute, and no comparison. Printed is the CPU time of one thread,
the least of three calls, imports not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject
from gradctl.training.chosen_variants import choose_variants
from gradctl.training.optimizers import optimizer_choice
from gradctl.training.plain_runs import PlainRuns
from gradctl.training.recipe import TrainingRecipe

TARGETS = [f"sample_models/{name}.py" for name in ("mlp", "transformer", "resnet", "gru")]
VARIANTS = ["foreach"]


def seconds(function: Callable[[], object]) -> float:
    """Return the least CPU time of three calls."""
    found = []
    for _ in range(3):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return min(found)


def bare(subject, steps):
    """Run the plain step and the variant in both precisions, and compare nothing."""
    runs = PlainRuns(TrainingRecipe(subject, optimizer_choice("adamw")), steps)
    (variant,) = choose_variants(VARIANTS, None)
    for precision in ("native", "float64"):
        for alter in (lambda trainer: None, variant.alter):
            trainer = runs.trainer(precision)
            alter(trainer)
            for number in range(steps):
                args, kwargs = runs.recipe.batch(trainer.instance, number)
                with trainer.context():
                    trainer.step(*args, **kwargs)


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"{steps} steps, torch {torch.__version__}, one thread\n{'target':<32}{'bare':>8}{'compare':>9}{'ratio':>7}")
    for target in sys.argv[2:] or TARGETS:
        subject = load_subject(TargetOptions(target))
        runs = seconds(lambda: bare(subject, steps))  # called at once
        compared = seconds(lambda: compare_steps(subject, steps, variants=VARIANTS))
        print(f"{target:<32}{runs:>7.2f}s{compared:>8.2f}s{compared / runs:>6.2f}x")


if __name__ == "__main__":
    main()
