"""A training step in a file: its time beside a step of eager, and the time of its export beside that of a joint graph.

    python tests/benchmarks/train_step_speed.py [NAME…] [--threads 1] [--seconds 20] [--profile] [--only steps]

A step is forward, backward and AdamW on the mean square of the output. Eager's is a loop of ``zero_grad``,
``backward`` and ``step`` of AdamW with ``foreach``; the file runs in onnxruntime with all optimisations, and its state
is the outputs of the step before. Both take turns, step by step; times are of the fastest step and of the median one,
in milliseconds, and as a ratio to eager in the same run. With ``--threads 1`` they are CPU times, which other processes
disturb less. ``--profile`` prints which operators the time of the file goes to.

The second table has the CPU seconds of ``gradctl export`` with ``--graph joint`` and ``--graph train-step`` on the same
target and loss, in turns: of the capture alone, and of the whole command, which verifies the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from gradctl.commands.export import export_joint
from gradctl.commands.export_train_step import export_train_step
from gradctl.forms.onnx import joint as onnx_joint
from gradctl.forms.onnx import train_step
from gradctl.joint.optimizer_update import OptimizerUpdate
from gradctl.subject.instance import Instance
from gradctl.subject.loading.load import make_subject
from gradctl.subject.loss_function import include_loss
from gradctl.subject.subject import Subject
from tests.benchmarks.joint_speed import MODELS, Inputs, print_profile, session_of, turns

NAMES = ("mlp", "encoder", "small")
EXPORTS = 2  # of each kind


def mean_square(output: Tensor) -> Tensor:
    """Return a loss that every model has."""
    return output.square().mean()


def eager_step(model: nn.Module, inputs: Inputs) -> Callable[[], float]:
    """Return a step of eager, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = mean_square(model(*inputs))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def file_step(path: Path, threads: int) -> Callable[[], float]:
    """Return a step of a file, which returns its loss."""
    session = session_of(path, threads)
    beside = path.with_suffix(".safetensors")
    with safetensors.safe_open(beside, "np") as file:
        feeds = json.loads(file.metadata()["train_step"])["feeds"]
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    values = {name: make(value) for name, value in safetensors.numpy.load_file(beside).items()}
    names = [each.name for each in session.get_outputs()]

    def step() -> float:
        found = dict(zip(names, session.run_with_ort_values(names, values), strict=True))
        values.update({name: found[output] for output, name in feeds.items()})
        return float(found["loss"].numpy())

    return step


def captures(subject: Subject) -> dict[str, Callable[[], Any]]:
    """Return the captures of both graphs, without verification."""
    inside = include_loss(subject)

    def step() -> Any:
        instance = Instance(inside, input_mode="constant", keep_hooks=True)
        parameters = dict(instance.model.named_parameters())  # type: ignore[attr-defined]
        optimizer = torch.optim.AdamW(list(parameters.values()))
        names = {id(value): name for name, value in parameters.items()}
        return train_step.export_graph(instance, OptimizerUpdate.of(optimizer, names, "output"))

    return {
        "joint": lambda: onnx_joint.export_graph(Instance(inside, keep_hooks=True), wrt=("param:*",)),
        "train-step": step,
    }


def commands(subject: Subject, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the exports of both graphs, with verification."""
    return {
        "joint": lambda: export_joint(subject, folder / "joint.onnx", wrt=("param:*",)),
        "train-step": lambda: export_train_step(subject, folder / "step.onnx", optimizer="adamw"),
    }


def fastest(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the CPU seconds of the fastest of some calls, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(EXPORTS), calls.items()):
        start = time.process_time()
        call()
        taken[name].append(time.process_time() - start)
    return {name: min(each) for name, each in taken.items()}


def one_step(name: str, threads: int, seconds: float, folder: Path, *, profile: bool) -> None:
    """Print the rows of one model in the table of steps."""
    model, inputs = MODELS[name]()
    model.train()
    path = folder / f"{name}.onnx"
    written = export_train_step(make_subject(model, inputs, loss=mean_square), path, optimizer="adamw")
    assert written.written, written.unit
    calls = {"eager": eager_step(model, inputs), "onnxruntime": file_step(path, threads)}
    losses = {each: call() for each, call in calls.items()}
    assert abs(losses["eager"] - losses["onnxruntime"]) <= 1e-4 * abs(losses["eager"]), losses
    taken = turns(calls, threads, seconds)
    for what, of in (("fastest", min), ("median", statistics.median)):
        figures = {each: of(times) for each, times in taken.items()}
        ratios = "".join(f"{each:>11.3f}ms {each / figures['eager']:>5.2f}" for each in figures.values())
        print(f"{name:<10}{what:<8}{ratios}", flush=True)
    if profile:
        values = safetensors.torch.load_file(path.with_suffix(".safetensors"))
        print_profile(path, threads, values)


def one_export(name: str, folder: Path) -> None:
    """Print the row of one model in the table of exports."""
    model, inputs = MODELS[name]()
    model.train()
    subject = make_subject(model, inputs, loss=mean_square)
    row = ""
    for calls in (captures(subject), commands(subject, folder)):
        taken = fastest(calls)
        joint, step = taken["joint"], taken["train-step"]
        row += f"{joint:>8.1f} s {step:>8.1f} s {step / joint:>5.2f}"
    print(f"{name:<10}{row}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", choices=("steps", "exports"), help="print one table  [default: both]")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {given.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "exports":
            print(f"{'a step':<18}{'eager':>13} {'ratio':>5}{'onnxruntime':>13} {'ratio':>5}")
            for name in given.names:
                one_step(name, given.threads, given.seconds, Path(folder), profile=given.profile)
        if given.only != "steps":
            print(f"{'an export':<10}{'joint':>10}{'train-step':>11} ratio{'verified':>10}{'train-step':>11} ratio")
            for name in given.names:
                one_export(name, Path(folder))


if __name__ == "__main__":
    main()
