"""The values beside a snapshot: at any moment the text and its values are a pair."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradctl.core.errors import ResourceError, TargetError
from gradctl.snapshots import values_file
from gradctl.snapshots.snapshot_file import read
from tests.snapshots.models import Net, X, errors, scaled, take, verify


def names_in(folder):
    return sorted(each.name for each in folder.iterdir())


def test_the_values_can_be_read_without_gradctl(tmp_path):
    path = tmp_path / "net.snapshot"
    take(path)
    (file,) = tmp_path.glob("net.snapshot.????????.safetensors")
    stored = load_file(file)
    assert torch.equal(stored["input:x"], X)
    assert torch.equal(stored["param:outer.weight"], Net().outer.weight)


@pytest.mark.parametrize("step", [1, 2])
def test_a_process_that_is_killed_between_two_files_leaves_the_old_snapshot(tmp_path, step):
    path = tmp_path / "net.snapshot"
    take(path)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        steps = iter([step > 1])
        replace = Path.replace
        # The first move is that of the values, the second that of the text.
        Path.replace = lambda self, target: replace(self, target) if next(steps, False) else os._exit(9)
        values_file.write_pair(path, b"new", values_file.describe(path, b"values", is_full=False), b"values")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert path.read_bytes() == before
    assert verify(path).verdict == "pass"


def test_an_exception_leaves_the_old_snapshot_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "net.snapshot"
    take(path)
    before = names_in(tmp_path), path.read_bytes()
    monkeypatch.setattr(values_file, "place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        take(path, Net(seed=1))
    assert (names_in(tmp_path), path.read_bytes()) == before


def test_the_values_of_the_old_snapshot_are_removed(tmp_path):
    path = tmp_path / "net.snapshot"
    other = tmp_path / "net.snapshot.of-mine.safetensors"
    other.write_bytes(b"")
    take(path)
    take(path, Net(seed=1))
    assert names_in(tmp_path) == sorted(["net.snapshot", other.name, read(path).header.values.name])


def test_update_rewrites_the_text_after_a_change_only(tmp_path):
    path = tmp_path / "net.snapshot"
    take(path, Net(seed=1))
    before = path.read_bytes(), names_in(tmp_path)
    assert verify(path, Net(), update=True).verdict == "pass"
    assert (path.read_bytes(), names_in(tmp_path)) == before
    unit = verify(path, scaled("outer.weight"), update=True)
    assert (unit.verdict, errors(unit)) == ("pass", [("GC311", "param:outer.weight")])
    assert all(each.allowed for each in unit.findings if each.severity == "error")
    assert names_in(tmp_path) == before[1]  # the same values
    changed = [
        (one, other)
        for one, other in zip(before[0].splitlines(), path.read_bytes().splitlines(), strict=True)
        if one != other
    ]
    assert len(changed) == 2  # the line of the gradient, and the digest
    assert verify(path, scaled("outer.weight")).verdict == "pass"
    assert errors(verify(path)) == [("GC311", "param:outer.weight")]


def test_values_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("gradctl.snapshots.take_snapshot.MOST_BYTES", 100)
    path = tmp_path / "net.snapshot"
    header = take(path).content.header
    assert (header.values, header.without_values) == (None, "they need 0 MB, more than 0 MB")
    assert take(path, full=True).content.header.values is not None


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "longer":
        file.write_bytes(content + b"x" * 10)
    else:
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "is missing. Copy it from where net.snapshot was taken, or take the snapshot again."),
        ("longer", "is not the values file that {path} was written with: it has {size} bytes, not {before}. Copy it"),
        ("other", "is not the values file that {path} was written with: it has another digest. Copy it from where"),
    ],
)
def test_other_values_are_refused(tmp_path, how, said):
    path = tmp_path / "net.snapshot"
    values = take(path).content.header.values
    file = tmp_path / values.name
    damage(file, how)
    with pytest.raises(TargetError) as raised:
        verify(path, Net(seed=1))
    assert raised.value.code == "GC133"
    assert said.format(path=path, size=values.bytes + 10, before=values.bytes) in raised.value.message


def test_sparse_values_are_known_by_their_digest(tmp_path):
    class Sparse(nn.Module):
        def __init__(self, factor=1.0):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))
            self.mix = (torch.eye(5) * factor).to_sparse()

        def forward(self, x):
            return (self.mix @ x.T).T * self.weight

    path = tmp_path / "sparse.snapshot"
    take(path, Sparse())
    assert verify(path, Sparse()).verdict == "pass"
    with pytest.raises(TargetError, match="GC135 .* holds no values of held:mix"):
        verify(path, Sparse(2.0))


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ResourceError, match="not a regular file"):
        take(pipe)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
