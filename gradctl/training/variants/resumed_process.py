"""The rest of a training run in a new process, which has nothing but the target and the saved state.

``python -m gradctl.training.variants.resumed_process FOLDER`` loads the target anew, loads the state, makes the steps
that are left, and saves their records. What the program keeps outside of the model (a global variable, an attribute of
a class) is lost there, as after a restart.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from gradctl.core.target_options import TargetOptions
from gradctl.environments.child import run_child
from gradctl.forms.form import Outcome
from gradctl.isolation.protocol import read_message, write_message
from gradctl.subject.instance import InputMode
from gradctl.subject.loading.load import load_subject
from gradctl.training.optimizers import optimizer_choice
from gradctl.training.plain_runs import PlainRuns
from gradctl.training.recipe import TrainingRecipe
from gradctl.training.trainer import StepRecord, Trainer
from gradctl.training.variants.resume import load_state

_REQUEST, _STATE, _RECORDS = "request.json", "state.pt", "records.pt"
_SECONDS = 300.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Which steps are left, of which run.

    Attributes:
        loading: how the target is loaded.
        optimizer: a name, or ``FILE:FACTORY``.
        input_mode: how the model takes float inputs.
        on_example: the steps that run on the example.
        is_float64: whether the run is in float64.
        start, steps: the number of the first step that is left, from 0, and of all steps.
    """

    loading: TargetOptions
    optimizer: str
    input_mode: InputMode
    on_example: tuple[int, ...]
    is_float64: bool
    start: int
    steps: int


def continue_in_process(trainer: Trainer, loading: TargetOptions, state: bytes) -> Iterator[StepRecord]:
    """Return the records of the steps that are left, made by a new process from a saved state.

    Raises:
        RuntimeError: the process ended without them; with the last line that it wrote.
    """
    recipe = trainer.recipe
    request = Request(
        loading=loading,
        optimizer=recipe.optimizer.name,
        input_mode=recipe.input_mode,
        on_example=tuple(sorted(recipe.on_example)),
        is_float64=trainer.is_float64,
        start=trainer.number,
        steps=trainer.steps,
    )
    with tempfile.TemporaryDirectory(prefix="gradctl-") as name:
        folder = Path(name)
        write_message(folder / _REQUEST, request)
        (folder / _STATE).write_bytes(state)
        command = [sys.executable, "-m", __name__, name]
        variables = {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        ended = run_child(command, timeout_seconds=_SECONDS, variables=variables)
        if ended.exit_status != 0:
            said = (ended.errors.strip() or "it wrote nothing").splitlines()[-1]
            raise RuntimeError(f"the new process does not continue the run: {said}")
        made: list[dict[str, Any]] = torch.load(folder / _RECORDS, weights_only=True)
    return iter([_record(each) for each in made])


def _record(each: dict[str, Any]) -> StepRecord:
    outcome = Outcome(each["outputs"], each["gradients"], each["state"])
    return StepRecord(outcome, each["updates"], each["loss_scale"], each["draws"])


def main(folder: Path) -> None:
    """Make the steps of the request in a folder, and save their records there."""
    request = read_message(folder / _REQUEST, Request)
    if request.loading.threads is not None:
        torch.set_num_threads(request.loading.threads)
    subject = load_subject(request.loading)
    recipe = TrainingRecipe(subject, optimizer_choice(request.optimizer), request.input_mode, set(request.on_example))
    trainer = PlainRuns(recipe, request.steps).trainer("float64" if request.is_float64 else "native")
    load_state(trainer, torch.load(folder / _STATE, weights_only=True))
    made = []
    for record in trainer.run(request.steps, request.start):
        outcome = record.kept().outcome
        tensors = {"outputs": outcome.outputs, "gradients": outcome.gradients, "state": outcome.state}
        made.append({**tensors, "updates": record.updates, "loss_scale": record.loss_scale, "draws": record.draws})
    torch.save(made, folder / _RECORDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
