"""The loop of a user around a training step in a file: onnxruntime, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors
import safetensors.numpy


class StepRunner:
    """A training step in a file with its state.

    Attributes:
        values: the inputs of the next step by name, the batch that of the example.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path)
        with safetensors.safe_open(path.with_suffix(".safetensors"), "np") as file:
            self.feeds = json.loads(file.metadata()["train_step"])["feeds"]
        self.values = safetensors.numpy.load_file(path.with_suffix(".safetensors"))

    def step(self, **batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Make a step, and return the outputs by name."""
        names = [output.name for output in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, {**self.values, **batch}), strict=True))
        self.values |= {name: found[output] for output, name in self.feeds.items()}
        return found
