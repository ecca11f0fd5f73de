"""``gradctl compare --form ranks:2`` on the targets of tests/ranks: the cause of each mistake, and its right twin.

    python tests/benchmarks/rank_mistakes.py [NAME…]

prints a row for each target. Exit code 1 if a mistake has no cause, or a right twin a finding above a note.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from gradctl.core.findings import Unit
from tests.ranks.bare import NAMES
from tests.ranks.test_corpus import compared


def main() -> int:
    """Compare the targets, print the table, and return the exit code."""
    failed = 0
    print(f"{'target':<26}{'mistake':<12}{'cause':<8}{'seconds':>8}  {'right twin':<12}parameters", flush=True)
    for name in sys.argv[1:] or NAMES:
        start = time.perf_counter()
        wrong = compared(name, wrong=True)
        seconds = time.perf_counter() - start
        right, causes = compared(name, wrong=False), _causes(wrong)
        tensors = dict.fromkeys(
            each.tensor for each in wrong.findings if each.tensor and each.tensor.startswith("param:")
        )
        failed += not causes or right.verdict != "pass"
        shown = ", ".join(each.removeprefix("param:") for each in tensors)
        print(f"{name:<26}{wrong.verdict:<12}{causes or '-':<8}{seconds:>8.1f}  {right.verdict:<12}{shown}", flush=True)
    return 1 if failed else 0


def _causes(unit: Unit) -> str:
    """Return the causes of a unit's errors, or the codes of findings about random numbers."""
    codes = {each.cause or each.code for each in unit.findings if each.severity != "note"}
    return "" if codes & {"GC402", "GC301", "GC620"} else ",".join(sorted(codes))


if __name__ == "__main__":
    sys.exit(main())
