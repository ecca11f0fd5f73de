"""``gradctl compare`` on the pairs of tests/kernels: mistakes found, false alarms, and what right kernels round.

    python tests/benchmarks/kernel_corpus.py [--seeds 20] [--only TEXT] [--dtype NAME] [--right | --wrong | --ratios]

prints a row a pair: right twins without and with a finding over the seeds, mistakes found and missed over the dtypes;
then quantiles of the right twins' error in that of their references. Exit code 1 if a right twin has a finding or a
mistake is missed. All seeds take an hour.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.kernels.comparison import compare, found_in
from tests.kernels.corpus import PAIRS
from tests.kernels.pairs import ALL, Pair, relative_errors

_QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
# With fewer elements the reference can be right by luck.
_FEW_ELEMENTS = 8


def main() -> int:
    """Compare the pairs, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="pairs whose name has this text")
    parser.add_argument("--dtype", help="one dtype")
    part = parser.add_mutually_exclusive_group()
    for name in ("right", "wrong", "ratios"):
        part.add_argument(f"--{name}", dest="part", action="store_const", const=name)
    options = parser.parse_args()
    dtypes = [each for each in ALL if options.dtype in (None, _name(each))]
    pairs = {name: pair for name, pair in PAIRS.items() if options.only in name}
    failed = 0
    if options.part != "ratios":
        print(f"{'pair':<34}{'silent':>8}{'alarms':>8}{'found':>8}{'missed':>8}", flush=True)
        for name, pair in pairs.items():
            failed += _row(name, pair, [each for each in dtypes if each in pair.dtypes], options)
    if options.part in (None, "ratios"):
        _print_ratios(pairs, dtypes, options.seeds)
    return 1 if failed else 0


def _row(name: str, pair: Pair, dtypes: list[torch.dtype], options: argparse.Namespace) -> int:
    """Print the row of a pair and what is wrong in it, and return the number of failures."""
    count, said = Counter(), []
    for dtype in dtypes:
        for seed in range(options.seeds if options.part != "wrong" else 0):
            unit = compare(pair, pair.right, dtype, seed)
            found = found_in(unit)
            count["alarms" if found or unit.verdict != "pass" else "silent"] += 1
            said += [f"  alarm {_name(dtype)} seed {seed}: {found or unit.reason}"] if found else []
        for mistake, wrong in pair.wrong.items() if options.part != "right" else ():
            if dtype in (wrong.dtypes or pair.dtypes):
                found = found_in(compare(pair, wrong.candidate, dtype, 0))
                count["found" if set(found) == wrong.names else "missed"] += 1
                said += [f"  {mistake} {_name(dtype)}: {found}"] if set(found) != wrong.names else []
    print(f"{name:<34}" + "".join(f"{count[each]:>8}" for each in ("silent", "alarms", "found", "missed")), flush=True)
    print(*said, sep="\n", end="\n" if said else "", flush=True)
    return count["alarms"] + count["missed"]


def _print_ratios(pairs: dict[str, Pair], dtypes: list[torch.dtype], seeds: int) -> None:
    """Print quantiles of (error of one) / (error of the other), the right twin and the reference, each as candidate."""
    print(f"\n{'candidate':<12}{'dtype':<10}{'tensors':>8}" + "".join(f"{each:>9.1%}" for each in _QUANTILES), end="")
    print("   (error - 4 own) / eps, largest")
    for dtype in dtypes:
        errors = torch.tensor(list(_errors(pairs, dtype, seeds)), dtype=torch.float64)
        for candidate, twin, own in (("fused", *errors.T), ("plain", *errors.T.flip(0))):
            ratios = (twin / own)[own > 0].quantile(torch.tensor(_QUANTILES, dtype=torch.float64))
            excess = float((twin - 4 * own).max()) / torch.finfo(dtype).eps
            print(f"{candidate:<12}{_name(dtype):<10}{len(errors):>8}", end="")
            print("".join(f"{float(each):>9.2f}" for each in ratios), f"  {excess:.2f}")


def _errors(pairs: dict[str, Pair], dtype: torch.dtype, seeds: int) -> Iterator[tuple[float, float]]:
    for pair in pairs.values():
        for seed in range(seeds if dtype in pair.dtypes else 0):
            inputs = pair.draw(seed, dtype)
            true, found = pair.evaluate(pair.right, inputs, dtype, seed)
            own = pair.evaluate_reference(inputs, dtype, seed)
            both = relative_errors(found, true), relative_errors(own, true)
            yield from ((both[0][k], both[1][k]) for k, value in true.items() if value.numel() >= _FEW_ELEMENTS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
