"""The search for the version of torch that changed a result, with stub wheels, and what it reports."""

from __future__ import annotations

import pytest

from gradctl.core.assembly import assemble_report
from gradctl.core.errors import ResourceError
from gradctl.core.findings import TensorResult, Unit
from gradctl.environments import torch_bisection
from gradctl.environments.child import Finished
from gradctl.environments.torch_bisection import bisect_torch
from gradctl.environments.torch_environment import CannotInstall
from gradctl.environments.versions import parse_range
from gradctl.report.machine import json
from tests.environments.stub_index import add_wheel
from tests.environments.test_torch_environment import index  # noqa: F401  # a fixture


def result(*errors):
    """Return a report as JSON: it passes without ``errors``, else gradients are off by these."""
    rows = [
        TensorResult(
            quantity="gradient", tensor=f"param:{name}", verdict="wrong", shape=(2,), dtype="float32", error=error
        )
        for name, error in zip("abc", errors, strict=False)
    ]
    same = TensorResult(quantity="gradient", tensor="param:z", verdict="same", shape=(2,), dtype="float32", error=1e-20)
    unit = Unit(target="net.py", form="eager", verdict="fail" if errors else "pass", tensors=(*rows, same))
    return json.render(assemble_report("verify", [unit], (), seed=0))


@pytest.fixture
def versions(monkeypatch, tmp_path):
    """Return a mapping that the test fills: by version, what gradctl prints with it, or an exception."""
    known = {}

    def environment_of(version, folder):
        if isinstance(known[version], CannotInstall):
            raise known[version]
        return folder / version

    def run_gradctl(version, python, arguments, *, timeout_seconds):
        printed = known[version]
        if isinstance(printed, Finished):
            return printed
        return Finished(0, printed, "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch_bisection, "list_versions", lambda folder: list(known))
    monkeypatch.setattr(torch_bisection, "environment_of", environment_of)
    monkeypatch.setattr(torch_bisection, "run_gradctl", run_gradctl)
    return known


def searched(text="2..3"):
    """Return the unit of a search, and the lines of its progress."""
    lines = []
    unit = bisect_torch(parse_range(text), ["verify"], timeout_seconds=60, progress=lines.append)
    return unit, lines


def messages(unit):
    return [finding.message for finding in unit.findings if finding.code == "GC137"]


def test_the_first_version_that_changes_tensors_is_named_with_the_worst(versions):
    for minor, printed in enumerate([result(), result(), result(1e-3, 2e-1, 1e-2), result(0.5)]):
        versions[f"2.1{minor}.0"] = printed
    unit, lines = searched()
    said = "torch 2.11.0 passes, torch 2.12.0 changes 3 tensors, the worst is param:b (relative error 2.00e-01)."
    tried = "2.10.0 passes; 2.11.0 passes; 2.12.0 changes 3 tensors, the worst is param:b (relative error 2.00e-01); "
    tried += "2.13.0 changes 1 tensor, the worst is param:a (relative error 5.00e-01)"
    assert messages(unit) == [said, f"versions tried: {tried}."]
    assert (unit.verdict, len(unit.tensors)) == ("fail", 4)
    assert lines[0].startswith("4 versions of torch, of which about 4 are tried; at most 4 are installed in /")
    assert lines[0].endswith("gradctl/torch: about 0.9 GB for each that is built for the CPU, 6 GB with CUDA\n")
    assert "torch 2.11.0 passes\n" in lines


def test_ends_that_agree_are_no_change(versions):
    versions |= {"2.10.0": result(), "2.12.0": result(0.1), "2.13.0": result()}
    unit, _ = searched()
    assert unit.verdict == "pass"
    assert messages(unit)[0] == "torch 2.10.0 passes, and so does torch 2.13.0: the change is not between them."


def test_versions_that_cannot_be_installed_are_skipped_and_named_with_the_reason(versions):
    gone = CannotInstall("No matching distribution found for torch")
    versions |= {"2.9.0": gone, "2.10.0": result(), "2.11.0": gone, "2.12.0": result(0.5), "2.13.0": gone}
    unit, _ = searched()
    first, tried = messages(unit)
    assert first.startswith("torch 2.10.0 passes, torch 2.12.0 changes 1 tensor")
    assert first.endswith("Between them are 2.11.0, which have no verdict.")
    assert "2.13.0 cannot be installed: No matching distribution found for torch." in tried


def test_a_range_without_a_version_is_refused(versions):
    versions |= {"2.10.0": result()}
    with pytest.raises(ResourceError, match=r"GC138 the index of pip has no torch 3\.0\.\.3\.1 for this Python"):
        searched("3.0..3.1")


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Finished(None, "", ""), "exceeded its time limit"),
        (Finished(2, "", "GC101 there is no file 'x'.\n"), "ended with exit status 2: GC101 there is no file 'x'"),
        (Finished(-11, "[", ""), "ended with exit status -11: without a message"),
    ],
)
def test_if_no_version_has_a_verdict_the_reason_is_named(versions, ended, reason):
    versions |= {"2.10.0": ended}
    with pytest.raises(ResourceError) as raised:
        searched()
    assert raised.value.message == f"no torch 2..3 has a verdict: torch 2.10.0 {reason}."


def test_stub_wheels_are_installed_run_and_bisected(index, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for version, printed in {"2.11.0": result(), "2.12.0": result(), "2.13.0": result(0.25)}.items():
        folder = tmp_path / version
        folder.mkdir()
        (folder / "result.json").write_text(printed)
        # What this torch computes: the report that the command reads is that in its folder.
        add_wheel(index, version, source=f"import os; os.chdir({str(folder)!r})")
    add_wheel(index, "2.14.0", requires=["gradctl-has-no-such-package"])
    arguments = ["report", "result.json", "--format", "json"]
    unit = bisect_torch(parse_range("2.11..2.14"), arguments, timeout_seconds=60, progress=lambda line: None)
    first, tried = messages(unit)
    assert first.startswith("torch 2.12.0 passes, torch 2.13.0 changes 1 tensor, the worst is param:a")
    assert "2.14.0 cannot be installed: No matching distribution found for gradctl-has-no-such-package." in tried
