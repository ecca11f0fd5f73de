"""Which model types of ``transformers`` a target ``hf:TYPE`` can name: built and run, refused, or crashed.

    python tests/benchmarks/hf_coverage.py [TYPE…]

Each type that has a class ``…For…`` is built with small sizes, and run forward and backward, some dozens in a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CHUNK = 40  # types in a process
SECONDS = 300  # for each process


class Outcome(NamedTuple):
    """What happened to one type: ``built``, ``refused`` or ``crashed``; and the class, or the reason."""

    model_type: str
    state: str
    said: str


def types_with_a_head() -> list[str]:
    """Return all model types of the installed version that have a class ``…For…``."""
    from transformers import CONFIG_MAPPING

    from gradctl.subject.libraries.transformers_models import heads

    return [name for name in sorted(CONFIG_MAPPING.keys()) if any("For" in head for head in heads(name))]


def tried(model_type: str) -> Outcome:
    """Return whether ``hf:TYPE`` is loaded, and gives each parameter that has a gradient a finite one."""
    from torch import Tensor

    from gradctl.core.errors import GradctlError
    from gradctl.core.target_options import TargetOptions
    from gradctl.subject.loading.load import load_subject
    from gradctl.subject.tree import leaves

    try:
        subject = load_subject(TargetOptions(f"hf:{model_type}"))
    except GradctlError as error:
        return Outcome(model_type, "refused", str(error))
    model = subject.module
    outputs = [each for _, each in leaves(model(*subject.args, **subject.kwargs)) if isinstance(each, Tensor)]
    sum(each.sum() for each in outputs if each.requires_grad).backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    if not gradients or not all(each.isfinite().all() for each in gradients):
        return Outcome(model_type, "crashed", f"{len(gradients)} gradients, not all finite")
    return Outcome(model_type, "built", type(model).__name__)


def in_a_process(types: list[str]) -> list[Outcome]:
    """Return the outcomes of these types; of one that ends the process, ``crashed``, and the others in a new one."""
    command = [sys.executable, __file__, "--here", *types]
    try:
        printed = subprocess.run(command, check=False, capture_output=True, timeout=SECONDS).stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
    outcomes = [Outcome(*json.loads(line)) for line in printed.splitlines() if line.startswith(b"[")]
    if len(outcomes) < len(types):
        outcomes.append(Outcome(types[len(outcomes)], "crashed", "the process ended, or took too long"))
        outcomes += in_a_process(types[len(outcomes) :]) if len(outcomes) < len(types) else []
    return outcomes


def here(types: list[str]) -> None:
    """Print the outcome of each type as a line of JSON."""
    for each in types:
        try:
            outcome = tried(each)
        except Exception as error:
            outcome = Outcome(each, "crashed", f"{type(error).__name__}: {error}")
        print(json.dumps(outcome), flush=True)


def main() -> None:
    """Print the table, and the number of types in each state."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        return here(arguments.types)
    types = arguments.types or types_with_a_head()
    outcomes = []
    for start in range(0, len(types), CHUNK):
        found = in_a_process(types[start : start + CHUNK])
        outcomes += found
        print("".join(f"{each.model_type:<32} {each.state:<8} {each.said}\n" for each in found), end="", flush=True)
    count = Counter(each.state for each in outcomes)
    share = 100 * count["built"] / len(outcomes)
    print(f"{len(outcomes)} types: {count['built']} built ({share:.0f} %), {count['refused']} refused, ", end="")
    print(f"{count['crashed']} crashed")
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
