"""How often a right training step is called wrong: every variant of the step, on all samples and 12 transformers.

    python -m tests.benchmarks.steps_false_alarms [--steps 10] [--variant NAME]… [TARGET]…

Transformers have labels, so that their loss is their own, and are in training mode. A line for each model and variant
has the verdict and the largest difference in tolerances. The number of alarms is to be 0; ``EXPECTED`` lists what
differs by definition.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from gradctl.commands.compare_steps import compare_steps
from gradctl.core.findings import Unit
from gradctl.core.names import VARIANTS
from gradctl.core.target_options import TargetOptions
from gradctl.subject.loading.load import load_subject
from gradctl.subject.subject import Subject

SAMPLES = Path(__file__).parents[2] / "sample_models"
# Without a parameter; needs Triton.
WITHOUT_STEPS = ("attention.py", "triton_kernel.py")
# A decoder or an encoder of each kind: positions learned, rotary, ALiBi; norms; experts; encoder and decoder; images.
TRANSFORMERS = (
    *("hf:gpt2", "hf:llama", "hf:opt", "hf:bloom", "hf:gpt_neox", "hf:gemma", "hf:qwen2", "hf:mixtral"),
    *("hf:bert", "hf:roberta", "hf:t5", "hf:vit"),
)
# A gradient that is a mean over the batch by mistake, and a loss that is a mean over tokens: micro-batches show both.
EXPECTED = {("wrong_backward.py", "accumulate:2"), ("accumulation.py", "accumulate:2")}


def with_labels(target: str) -> Subject:
    """Return a model of transformers in training mode, with labels among its inputs."""
    subject = load_subject(TargetOptions(target=target, training=True))
    generator = torch.Generator().manual_seed(1)
    outputs = subject.model(*subject.args, **subject.kwargs)
    logits = outputs.logits
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    return replace(subject, kwargs={**subject.kwargs, "labels": labels})


def samples() -> list[str]:
    """Return the targets of all samples that can be trained."""
    return [str(path) for path in sorted(SAMPLES.glob("*.py")) if path.name not in WITHOUT_STEPS]


def largest(unit: Unit) -> float:
    """Return the largest error of a unit in tolerances, of what is compared."""
    ratios = [
        float(each.error) / float(each.budget)
        for each in unit.tensors
        if each.error is not None and each.budget and each.verdict == "same"
    ]
    return max(ratios, default=0.0)


def main() -> None:
    """Print a line for each model and variant, and the number of alarms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variant", action="append")
    options = parser.parse_args()
    variants = options.variant or [name if each is None else f"{name}:{each}" for name, each in VARIANTS.items()]
    counted, most = Counter[str](), 0.0
    for target in options.targets or [*samples(), *TRANSFORMERS]:
        subject = with_labels(target) if target.startswith("hf:") else load_subject(TargetOptions(target=target))
        for unit in compare_steps(subject, options.steps, variants=variants, is_named=False, on_unit=show):
            counted[said_of(unit)] += 1
            most = max(most, largest(unit))
    print(f"{dict(counted)}; the largest difference is {most:.2g} tolerances")


def said_of(unit: Unit) -> str:
    """Return the verdict on a unit, or that it is an alarm."""
    if unit.verdict in ("pass", "skipped"):
        return unit.verdict
    return "expected" if (Path(unit.target).name, unit.form) in EXPECTED else "ALARM"


def show(unit: Unit) -> None:
    """Print a unit."""
    name = Path(unit.target).name
    print(f"{name:24} {unit.form:21} {said_of(unit):9} {largest(unit):8.1e} {unit.seconds:6.1f} s")
    for text in (*(f"{each.message} {each.cause_message}" for each in unit.findings), unit.reason):
        if text:
            print(f"    {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
