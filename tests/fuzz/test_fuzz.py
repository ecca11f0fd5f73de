"""Mutated files: each gets a result or one clear sentence, in time and memory, and nothing is written but the output.

A worker runs the commands, so that a library that crashes on a file is seen, and ends nothing but that command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.fuzz.corpus import MODEL, onnx_models, weight_bytes
from tests.fuzz.mutations import mutated
from tests.fuzz.supervisor import Supervisor, faults, snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and address-space limits")

_LINES = 12  # of a traceback
SECONDS = 60  # of one command, beside others on two cores; the slowest that is right takes 5

# Kind → how many files: 2 000 that are no archives, 400 that are, and of each the first few in every run.
ALL = {
    **{"onnx": 1000, "weights": 200, "inputs": 150, "json": 350, "toml": 300},
    **{"npz": 150, "checkpoint": 150, "program": 100},
}
SAMPLE = {
    **{"onnx": 60, "weights": 20, "inputs": 15, "json": 30, "toml": 30},
    **{"npz": 15, "checkpoint": 15, "program": 10},
}

# Kind → the name of the mutated file, and the commands that it goes through.
COMMANDS = {
    "onnx": (
        "model.onnx",
        [
            ["inspect", "FILE"],
            ["inspect", "FILE", "--format", "json"],
            ["compare", "MODELS/right.onnx", "FILE"],
            ["compare", "FILE", "FILE"],
            ["compare", "MODELS/net.py", "FILE"],
            ["optimize", "FILE", "-o", "OUT/optimized.onnx"],
        ],
    ),
    "weights": ("w.safetensors", [["gradcheck", "MODELS/net.py", "--weights", "FILE"]]),
    "inputs": ("x.safetensors", [["gradcheck", "MODELS/net.py", "--inputs", "FILE"]]),
    "npz": ("x.npz", [["gradcheck", "MODELS/net.py", "--inputs", "FILE"]]),
    "checkpoint": ("w.pt", [["gradcheck", "MODELS/net.py", "--weights", "FILE"]]),
    "program": ("model.pt", [["inspect", "FILE"], ["compare", "MODELS/net.py", "FILE"]]),
    "json": ("report.json", [["report", "FILE", "--format", each] for each in ("console", "junit", "github")]),
    "toml": ("gradctl.toml", [["check", "--config", "FILE", "--list"]]),
}


class Place:
    """Folders in which mutated files are tried: beside them lie files that they may name, and some they must not."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.output = root, root / "given" / "folder", root / "output"
        self.models = root / "models"
        for each in (self.folder, self.output, self.models, root / "worker"):
            each.mkdir(parents=True)
        (self.models / "net.py").write_text(MODEL)
        (self.models / "right.onnx").write_bytes(onnx_models()[0].SerializeToString())
        (self.folder / "weights.bin").write_bytes(weight_bytes())
        (self.folder.parent / "secret.bin").write_bytes(weight_bytes())
        (self.folder / "link.bin").symlink_to("../secret.bin")
        os.mkfifo(self.folder / "pipe")
        self.worker = Supervisor(root / "worker", SECONDS)

    def faults_of(self, kind: str, number: int) -> list[str]:
        """Return what goes wrong with a mutated file, in each command that reads such files."""
        name, commands = COMMANDS[kind]
        file, content = self.folder / name, mutated(kind, number)
        file.write_bytes(content)
        before = snapshot(self.root, without=self.output)
        found = []
        for command in commands:
            answer = self.worker.run([self._filled(word, file) for word in command])
            if wrong := faults(answer):
                said = "\n".join(answer.stderr.splitlines()[-_LINES:])
                found.append(f"{kind} {number}, {' '.join(command)}: {', '.join(wrong)}\n{said}")
        after = snapshot(self.root, without=self.output)
        changed = {path for path, _ in before.items() ^ after.items() if not self._is_of_worker(path)}
        file.unlink()
        return found + [f"{kind} {number}: {path} was written" for path in changed]

    def _is_of_worker(self, path: str) -> bool:
        """Tell what libraries keep (a cache of inductor, what was said) from what a command should have removed."""
        return path.startswith(str(self.root / "worker")) and "/gradctl-" not in path

    def _filled(self, word: str, file: Path) -> str:
        filled = {"FILE": file, "FOLDER": self.folder, "MODELS": self.models, "OUT": self.output}
        for key, path in filled.items():
            word = word.replace(key, str(path))
        return word


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("fuzz"))
    yield place
    place.worker.close()


@pytest.mark.parametrize("kind", SAMPLE)
def test_mutated_files_get_a_result_or_a_sentence(place, kind):
    assert [fault for number in range(SAMPLE[kind]) for fault in place.faults_of(kind, number)] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_two_thousand_mutated_files_get_a_result_or_a_sentence(place, kind):
    assert [fault for number in range(ALL[kind]) for fault in place.faults_of(kind, number)] == []
