"""Which families of transformers can be exported as a training step with AdamW: 24 small models, ``hf:TYPE``.

    python -m tests.benchmarks.train_step_coverage [TYPE…] [--steps 0]

Each is exported by ``gradctl export --graph train-step``, which compares 20 steps in onnxruntime with torch.optim; the
loss is the mean square of all outputs. Printed: the verdict (``pass``, or why there is no file), and the seconds.
``--steps 200`` then trains on the example with the file and with torch, and prints the largest error of a parameter,
relative to its norm.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradctl.commands.export_train_step import export_train_step
from gradctl.core.errors import GradctlError
from gradctl.core.target_options import TargetOptions
from gradctl.subject.instance import Instance
from gradctl.subject.loading.load import load_subject
from gradctl.subject.subject import Subject
from gradctl.subject.tree import leaves
from tests.benchmarks.snapshot_refreshes import TYPES
from tests.training.step_runner import StepRunner


def mean_squares(outputs: Any) -> Tensor:
    """Return the sum of the mean squares of all outputs, which is a loss that every model has."""
    found = [each for _, each in leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    return torch.stack([each.square().mean() for each in found]).sum()


def error_after(steps: int, subject: Subject, path: Path, loss: Callable[..., Tensor]) -> float:
    """Return the largest relative error of a parameter after some steps of a file, against torch.optim."""
    instance = Instance(subject, input_mode="constant")
    model: Any = instance.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    runner = StepRunner(path)
    for _ in range(steps):
        args, kwargs = instance.inputs()
        optimizer.zero_grad()
        loss(model(*args, **kwargs)).backward()
        optimizer.step()
        runner.step()
    trained = {name: each for name, each in model.named_parameters() if name in runner.values}
    errors = {name: torch.from_numpy(runner.values[name]) - each.detach() for name, each in trained.items()}
    return max(float(error.norm() / trained[name].norm().clamp_min(1e-30)) for name, error in errors.items())


def verdict_of(name: str, path: Path, steps: int) -> tuple[str, str]:
    """Return the verdict on the training step of a family, and why it has none or how exact it is."""
    try:
        subject = replace(load_subject(TargetOptions(f"hf:{name}")), loss=mean_squares)
        written = export_train_step(subject, path, optimizer="adamw")
    except GradctlError as error:
        return "refused", str(error)
    unit = written.unit
    if not written.written:
        said = [each.message for each in unit.findings]
        return str(unit.verdict or unit.status), unit.reason or " ".join(said)
    error = f"after {steps} steps {error_after(steps, subject, path, mean_squares):.1e}" if steps else ""
    return "pass", "; ".join(filter(None, [unit.reason, error]))


def main() -> None:
    """Print a line for each family, and how many pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES, metavar="TYPE")
    parser.add_argument("--steps", type=int, default=0, help="to train with the file and with torch  [default: none]")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in given.types:
            start = time.perf_counter()
            verdict, said = verdict_of(name, Path(folder) / f"{name}.onnx", given.steps)
            passed += verdict == "pass"
            print(f"{name:<12}{verdict:<14}{time.perf_counter() - start:>6.1f} s  {said}", flush=True)
    print(f"{passed} of {len(given.types)} families pass")


if __name__ == "__main__":
    main()
