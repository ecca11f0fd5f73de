"""``gradctl check --snapshot DIR``: units with a snapshot each, files that are missing, written, stale."""

from __future__ import annotations

import pytest

from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.core.findings import Unit
from gradctl.core.names import snapshot_name
from gradctl.suite.configuration import parse_configuration
from gradctl.suite.kept_snapshots import ensure_exists, note_unused_files
from gradctl.suite.plan import plan
from gradctl.suite.worker import run_unit

TARGETS = '[[targets]]\ntarget = "net.py"\n[[targets]]\ntarget = "models/big.py:make"\nname = "wide"\n'
NET = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x):
        return SCALE * self.fc(x)


def make_model():
    return Net()


def example_inputs():
    return (torch.ones(4, 3),)
"""


def planned(tmp_path, text=TARGETS, **options):
    project = parse_configuration(tmp_path / "gradctl.toml", text)
    return plan(project, project.configuration.targets, **options)


def test_each_target_has_a_unit_with_a_file_named_after_its_title(tmp_path):
    units = planned(tmp_path, "forms = ['eager']\nsnapshots = 'kept'\n" + TARGETS)
    assert [(each.form, each.request.snapshot) for each in units] == [
        ("eager", None),
        ("snapshot", tmp_path / "kept" / "net.py.snapshot"),
        ("eager", None),
        ("snapshot", tmp_path / "kept" / snapshot_name("models/big.py:make[wide]")),
    ]


def test_without_a_folder_there_is_no_unit_of_a_snapshot(tmp_path):
    assert "snapshot" not in {each.form for each in planned(tmp_path)}


def test_a_folder_that_is_given_replaces_that_of_the_configuration(tmp_path):
    (unit, _) = planned(tmp_path, "snapshots = 'kept'\n" + TARGETS, snapshots=tmp_path / "new", forms=["snapshot"])
    assert (unit.request.snapshot, unit.request.update) == (tmp_path / "new" / "net.py.snapshot", False)


def test_another_form_selects_no_snapshot(tmp_path):
    assert {each.form for each in planned(tmp_path, "snapshots = 'kept'\n" + TARGETS, forms=["trace"])} == {"trace"}


def test_the_verdict_of_a_snapshot_can_be_expected_and_its_findings_accepted(tmp_path):
    text = 'snapshots = "kept"\n[[targets]]\ntarget = "net.py"\nexpect = {snapshot = "fail"}\n'
    text += '[[allow]]\nfinding = "GC311"\nform = "snapshot"\n'
    *_, unit = planned(tmp_path, text)
    assert (unit.form, unit.expected, unit.request.allows) == ("snapshot", "fail", ("GC311",))


def test_a_missing_file_is_skipped_with_the_line_that_writes_it(tmp_path):
    with pytest.raises(NothingToCheck) as raised:
        ensure_exists(tmp_path / "net.py.snapshot")
    line = f"gradctl check --snapshot {tmp_path} --form snapshot --update"
    assert raised.value.message == f"{tmp_path} has no snapshot of this target. Write it: {line}."


def test_files_without_a_target_are_noted_in_the_first_snapshot(tmp_path):
    for name in ("net.py.snapshot", "old.py.snapshot", "old.py.snapshot.01234567.safetensors"):
        (tmp_path / name).touch()
    units = [Unit(target="net.py", form=form, verdict="pass") for form in ("eager", "snapshot")]
    entries = [each.entry for each in planned(tmp_path)]
    eager, noted = note_unused_files(tmp_path, entries, units)
    assert eager == units[0]
    (finding,) = noted.findings
    said = f"old.py.snapshot in {tmp_path} belongs to no target of the configuration."
    assert (finding.code, finding.severity, finding.message) == ("GC139", "note", said)
    (tmp_path / "old.py.snapshot").unlink()
    assert note_unused_files(tmp_path, entries, units) == units


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that checks the snapshot of a model, whose output is multiplied by a scale, in this process."""
    monkeypatch.chdir(tmp_path)

    def run_snapshot(scale=1.0, *, source=NET, update=False):
        (tmp_path / "net.py").write_text(source.replace("SCALE", str(scale)))
        (unit,) = planned(
            tmp_path, '[[targets]]\ntarget = "net.py"', snapshots=tmp_path / "kept", forms=["snapshot"], update=update
        )
        return run_unit(unit.request)

    return run_snapshot


def test_a_snapshot_is_written_once_and_then_verified(run, tmp_path):
    written = run(update=True)
    assert (written.verdict, [each.code for each in written.findings]) == ("pass", ["GC139"])
    assert (tmp_path / "kept" / "net.py.snapshot").is_file()
    assert run().verdict == "pass"
    changed = run(1.001)
    assert changed.verdict == "fail"
    assert {each.tensor for each in changed.findings if each.code == "GC311"} >= {"param:fc.weight", "param:fc.bias"}


def test_update_rewrites_what_differs_after_it_is_listed(run):
    run(update=True)
    updated = run(1.001, update=True)
    assert updated.verdict == "pass"
    assert "param:fc.weight" in {each.tensor for each in updated.findings if each.allowed}
    assert "net.py.snapshot was rewritten, which changes 4 tensors, the worst is " in updated.findings[-1].message
    assert (run(1.001).verdict, run().verdict) == ("pass", "fail")


def test_update_replaces_the_snapshot_of_a_model_with_other_parameters(run):
    run(update=True)
    other = NET.replace("Linear(3, 2)", "Linear(3, 2, bias=False)")
    with pytest.raises(TargetError, match="GC134"):
        run(source=other)
    replaced = run(source=other, update=True)
    assert "was written in place of one that does not fit: GC134" in replaced.findings[-1].message
    assert run(source=other).verdict == "pass"
