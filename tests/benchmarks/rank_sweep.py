"""Right models on many ranks: every sample and small models of transformers under DDP and FSDP, and some by their own
plan of tensor parallelism. Prints a line for each, and how many fail without being known to be wrong.

``python -m tests.benchmarks.rank_sweep [WORD …]`` selects those whose name and form have a WORD in them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gradctl.commands.compare import compare_one
from gradctl.core.errors import GradctlError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject

SAMPLES = sorted(Path("sample_models").glob("*.py"))
LIBRARY = [
    f"hf:{name}"
    for name in ("llama", "gpt2", "bert", "t5", "mistral", "qwen2", "gemma", "opt", "vit", "roberta", "mixtral", "phi")
]
BY_PLAN = [f"hf:{name}" for name in ("llama", "qwen2", "phi", "qwen3", "granite", "cohere", "olmo")]
# What DDP or FSDP computes is another step than that of one process: a mean over tokens of shares with unequal numbers
# of them; parameters that one rank does not use, whose part of the gradient FSDP leaves out there; a backward that is
# wrong, and depends on the batch.
WRONG = {
    *(("accumulation", form) for form in ("ddp:2", "fsdp:2")),
    *(("wrong_backward", form) for form in ("ddp:2", "fsdp:2")),
    ("control_flow", "fsdp:2"),
}
CASES = [(target, form) for target in (*map(str, SAMPLES), *LIBRARY) for form in ("ddp:2", "fsdp:2")]
CASES += [(target, "tp:2") for target in ("sample_models/transformer.py", *BY_PLAN)]


def main(words: list[str]) -> int:
    """Compare each case, and return how many have another verdict than expected."""
    failed = 0
    for target, form in CASES:
        if words and not any(word in f"{target} {form}" for word in words):
            continue
        start = time.perf_counter()
        try:
            unit = compare_one(load_subject(TargetOptions(target)), form, named=True)
        except GradctlError as error:
            print(f"{target:38} {form:7} not loaded: {error}", flush=True)
            continue
        errors = [each.error for each in unit.tensors if each.verdict != "too-small" and isinstance(each.error, float)]
        worst = f"largest error {max(errors, default=0.0):.1e}"
        said = unit.reason if unit.status != "complete" else "; ".join(each.message for each in unit.findings)[:300]
        print(
            f"{target:38} {form:7} {unit.verdict:12} {worst} {time.perf_counter() - start:.1f} s  {said or ''}",
            flush=True,
        )
        failed += (unit.verdict == "fail") != ((Path(target).stem, form) in WRONG)
    print(f"{failed} with another verdict than expected")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
