"""How many planted bugs gradcheck finds, and how many right programs it leaves alone: the programs of tests/redteam.

    python tests/benchmarks/redteam.py [--jobs 2] [--seed 0] [--only TEXT] [--every N] [--output FILE]

prints a row a kind of place, then each program that went wrong. Exit code 1 if less than 99 % of the planted are found
or named, one crashes or is refused, a right one fails, or more than 1 % are inconclusive.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.redteam.programs import Program, planted_programs, right_programs
from tests.redteam.trial import FINE, Trial, tried

_OF_PLANTED = ("found", "named", "missed", "refused", "crash")
_OF_RIGHT = ("passed", "warned", "flagged", "inconclusive", "refused", "crash")


def main() -> int:
    """Try the programs, print the rates, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="programs whose name has this text")
    parser.add_argument("--every", type=int, default=1, help="one program in so many")
    parser.add_argument("--output", type=Path, help="a line for each program")
    options = parser.parse_args()
    programs = [*planted_programs(options.seed), *right_programs(options.seed)]
    programs = [each for each in programs if options.only in each.name][:: options.every]
    trials = _tried(programs, options.jobs, options.output)
    planted = [trial for trial in trials if trial.program.bug is not None and trial.outcome != "equal"]
    right = [trial for trial in trials if trial.program.bug is None]
    _print_rates("planted", planted, _OF_PLANTED)
    _print_rates("right", right, _OF_RIGHT)
    for trial in trials:
        if trial.outcome not in FINE:
            print(f"{trial.outcome:<13}{trial.program.name}: {trial.said}")
    slowest = sorted(trials, key=lambda trial: -trial.seconds)[:5]
    print("slowest:", "; ".join(f"{trial.seconds:.1f} s {trial.program.name}" for trial in slowest))
    return 0 if _is_good(planted, right) else 1


def _tried(programs: Sequence[Program], jobs: int, output: Path | None) -> list[Trial]:
    trials = []
    with get_context("spawn").Pool(jobs, maxtasksperchild=200) as pool:
        for number, trial in enumerate(pool.imap_unordered(tried, programs), 1):
            trials.append(trial)
            if output is not None:
                with output.open("a") as file:
                    file.write(f"{trial.outcome}\t{trial.seconds:.2f}\t{trial.program.name}\t{trial.said}\n")
            print(f"\r{number} of {len(programs)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return sorted(trials, key=lambda trial: trial.program.name)


def _print_rates(title: str, trials: Sequence[Trial], outcomes: Sequence[str]) -> None:
    print(f"{title:<10}{'programs':>9}" + "".join(f"{outcome:>13}" for outcome in outcomes))
    for kind in [*dict.fromkeys(trial.program.kind for trial in trials), "all"]:
        counts = Counter(trial.outcome for trial in trials if kind in (trial.program.kind, "all"))
        print(f"{kind:<10}{counts.total():>9}" + "".join(f"{counts[outcome]:>13}" for outcome in outcomes))
    print()


def _is_good(planted: Sequence[Trial], right: Sequence[Trial]) -> bool:
    of_planted, of_right = (Counter(trial.outcome for trial in trials) for trials in (planted, right))
    broken = sum(counts[word] for counts in (of_planted, of_right) for word in ("crash", "refused"))
    return (
        not broken
        and not of_right["flagged"]
        and of_right["inconclusive"] <= len(right) / 100
        and of_planted["missed"] <= len(planted) / 100
    )


if __name__ == "__main__":
    sys.exit(main())
