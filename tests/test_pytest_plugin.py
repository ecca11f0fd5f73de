"""The pytest plugin, run as pytest runs it: the fixture, the marker, and what a failure shows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command_line import run_module

pytest_plugins = "pytester"

README = Path(__file__).parents[1] / "README.md"

MODELS = """
import pytest
import torch
from torch import nn


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return Doubling.apply(self.fc(x))


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("width must be even")


X = torch.ones(4, 3)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs pytest with this plugin alone on the models and some tests of them."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("CI", "BUILD_NUMBER"):  # pytest prints summary lines whole where one of these is set
        monkeypatch.delenv(name, raising=False)

    def run_pytest(tests: str, *options: str):
        pytester.makepyfile(MODELS + tests)
        return run_forked(pytester, "--strict-markers", *options)

    return run_pytest


def run_forked(pytester, *options: str) -> pytest.RunResult:
    """Return what ``pytester.runpytest_subprocess`` does with this plugin, from a process that has torch already."""
    arguments = [f"--basetemp={pytester.path / 'basetemp'}", "-p", "gradctl.pytest_plugin", *options]
    finished = run_module("pytest", arguments, pytester.path, dict(os.environ))
    lines = finished.stdout.splitlines(), finished.stderr.splitlines()
    print(finished.stdout, finished.stderr)
    return pytest.RunResult(finished.returncode, *lines, duration=0.0)


def example() -> str:
    (block,) = re.findall(r"<!-- pytest-it -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return block


def test_the_package_names_its_plugin():
    (entry,) = importlib.metadata.entry_points(group="pytest11", name="gradctl")
    assert entry.value == "gradctl.pytest_plugin"


def test_the_plugin_loads_no_torch_and_no_msgspec():
    script = "import json, sys, gradctl.pytest_plugin; print(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(finished.stdout))
    assert loaded.isdisjoint({"torch", "numpy", "msgspec", "rich", "click", "onnx"})
    assert {name for name in loaded if name.partition(".")[0] == "gradctl"} == {
        "gradctl",
        "gradctl.core",
        "gradctl.core.errors",
        "gradctl.pytest_plugin",
    }


def test_a_run_that_has_no_use_for_it_stays_without_torch(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("def test_nothing():\n    import sys\n    assert not {'torch', 'msgspec'} & sys.modules.keys()")
    pytester.runpytest_subprocess("-p", "gradctl.pytest_plugin").assert_outcomes(passed=1)


def test_the_example_of_the_readme_passes(run, pytester):
    pytester.makepyfile(test_readme=example())
    run("", "test_readme.py").assert_outcomes(passed=2)


def test_the_example_of_the_readme_fails_by_name_with_a_mean_for_the_sum_and_its_summary_fits(run, pytester):
    wrong = example().replace("(gradient * x).sum(0)", "(gradient * x).mean(0)")
    assert wrong != example()
    pytester.makepyfile(test_readme=wrong)
    result = run("", "test_readme.py")
    result.assert_outcomes(failed=2)
    lines = [line for line in result.outlines if line.startswith("FAILED ")]
    assert lines[0] == "FAILED test_readme.py::test_gradients_are_derivatives - GC408 1 of 4 is wrong"
    assert all(len(line) <= 80 for line in lines)
    named = [line for line in result.outlines if re.match(r"E +param:weight  float32\[3\]  WRONG ", line)]
    assert len(named) == 2


def test_a_failure_is_the_report_below_the_users_line_and_no_frame_of_ours(run):
    result = run(
        """
import gradctl as functions

def test_fixture(gradctl):
    gradctl.gradcheck(Wrong(), X)

def test_function():
    report = functions.gradcheck(Wrong(), X)
    report.raise_if_failed()
"""
    )
    result.assert_outcomes(failed=2)
    report = [
        "E       gradctl.CheckFailed: FAIL: 3 of 3 gradients are wrong (gradctl explain GC408)",
        "E       error GC408 Doubling.backward is not the derivative in 'x': off by 1.00e+00",
        "E         param:fc.weight  float32[[]2, 3]  WRONG *1.00e+00 *",
        "test_a_failure_is_the_report_below_the_users_line_and_no_frame_of_ours.py:*: CheckFailed",
    ]
    result.stdout.fnmatch_lines(
        [">       gradctl.gradcheck(Wrong(), X)", *report, ">       report.raise_if_failed()", *report]
    )
    assert_no_frame_of_ours(result)
    assert result.stdout.str().count("FAIL: 3 of 3 gradients are wrong") == 2  # once in each test


def assert_no_frame_of_ours(result) -> None:
    """Assert that no place of gradctl's or torch's files is printed."""
    places = re.findall(r"^(\S+\.py):\d+: ", result.stdout.str(), re.MULTILINE)
    assert places
    assert all(Path(place).name.startswith("test_") for place in places)


def test_a_model_that_raises_shows_the_users_frames_and_one_sentence(run):
    result = run(
        """
def test_it(gradctl):
    gradctl.compare(Raises(), X)
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>       raise ValueError("width must be even")',
            "E       ValueError: width must be even",
            "The above exception was the direct cause of the following exception:",
            ">       gradctl.compare(Raises(), X)",
            "E       gradctl.*.TargetError: GC111 Raises raises on x=f32[[]4,3]: ValueError: width must be even.",
        ]
    )
    assert_no_frame_of_ours(result)


def test_what_is_inconclusive_or_raises_nothing_is_told_apart(run):
    result = run(
        """
COUNT = iter(range(1000))

def test_inconclusive(gradctl):
    gradctl.gradcheck(lambda x: x * next(COUNT), X)

def test_passes(gradctl, tmp_path):
    assert gradctl.gradcheck(torch.nn.Linear(3, 2), X).verdict == "pass"
    gradctl.export(torch.nn.Linear(3, 2), X, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").is_file()

def test_looks_at_a_failing_report():
    import gradctl
    assert gradctl.gradcheck(Wrong(), X).verdict == "fail"
"""
    )
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(["E       gradctl.CheckFailed: INCONCLUSIVE: the model differs from itself when run *"])


def test_the_marker_sets_defaults_and_the_closest_and_the_call_win(run):
    result = run(
        """
pytestmark = pytest.mark.gradctl(allow=["GC408:Doubling"], seed=3, forms=["trace"])

def test_of_the_module(gradctl):
    report = gradctl.gradcheck(torch.nn.Sequential(Wrong(), torch.nn.Linear(2, 2)), X)
    assert (report.seed, report.allows[0].applied) == (3, True)

@pytest.mark.gradctl(seed=4)
class TestOfAClass:
    def test_of_the_class(self, gradctl):
        report = gradctl.compare(torch.nn.Linear(3, 2), X)
        assert (report.seed, [unit.form for unit in report.units]) == (4, ["eager", "trace"])
        assert [allow.allow for allow in report.allows] == ["GC408:Doubling"]

    @pytest.mark.gradctl(seed=5)
    def test_of_the_call(self, gradctl):
        assert gradctl.gradcheck(torch.nn.Linear(3, 2), X).seed == 5
        assert gradctl.gradcheck(torch.nn.Linear(3, 2), X, seed=6, allow=()).seed == 6

@pytest.mark.gradctl(fail_on="note")
def test_of_severity(gradctl):
    gradctl.gradcheck(torch.nn.Linear(3, 2), X)
"""
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["E *note GC150 --allow GC408:Doubling accepted nothing in this run."])


def test_a_test_that_uses_the_fixture_has_the_marker(run):
    tests = """
def test_with(gradctl):
    pass

def test_without():
    pass
"""
    run(tests, "-m", "gradctl").assert_outcomes(passed=1, deselected=1)


def test_the_marker_is_listed_and_what_it_does_not_take_is_said(run):
    tests = """
@pytest.mark.gradctl(alow=["GC408"])
def test_misspelt(gradctl):
    pass

@pytest.mark.gradctl("GC408")
def test_without_a_name(gradctl):
    pass
"""
    result = run(tests)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        [
            "*gradctl of *::test_misspelt: no option 'alow' (did you mean 'allow'?). There are allow, fail_on, *",
            "*gradctl of *::test_without_a_name: 'GC408' has no name. Give keywords: allow, fail_on, forms, seed.",
        ]
    )
    run(tests, "--markers").stdout.fnmatch_lines(
        ["@pytest.mark.gradctl(allow=(), fail_on='error', forms=None, seed=0): *"]
    )


TARGETS = {
    "right": "return torch.nn.Linear(3, 2)",
    "wrong": "return Wrong()",
    "branch": "return lambda x: x.sin() if x.sum() > 0 else x.cos()",
    "crash": "return lambda x: print('so far') or os.abort()",
}
CONFIGURATION = """
[[targets]]
target = "right.py"
forms = ["eager", "trace"]

[[targets]]
target = "wrong.py"
forms = ["eager"]

[[targets]]
target = "branch.py"
forms = ["export"]
expect = {export = "inconclusive"}

[[targets]]
target = "crash.py"
forms = ["eager"]
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """Write the targets, their configuration, and a test beside them."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, body in TARGETS.items():
        inputs = "def example_inputs():\n    return (X,)\n"
        pytester.makepyfile(**{name: f"import os\n{MODELS}\ndef make_model():\n    {body}\n\n{inputs}"})
    pytester.makefile(".toml", gradctl=CONFIGURATION)
    pytester.mkdir("tests").joinpath("test_nothing.py").write_text("def test_nothing():\n    pass\n")
    return lambda *options: run_forked(pytester, *options)


@pytest.mark.slow
def test_targets_of_a_configuration_are_tests_in_processes_of_their_own(project):
    result = project("--gradctl", "-v")
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.fnmatch_lines(
        [
            "gradctl.toml::right.py[[]eager] PASSED *",
            "gradctl.toml::right.py[[]trace] PASSED *",
            "gradctl.toml::wrong.py[[]eager] FAILED *",
            "gradctl.toml::branch.py[[]export] PASSED *",
            "gradctl.toml::crash.py[[]eager] FAILED *",
            "tests/test_nothing.py::test_nothing PASSED *",
            "*_ wrong.py, eager _*",
            "FAIL: 3 of 3 gradients are wrong (gradctl explain GC408)",
            "error GC408 Doubling.backward is not the derivative in 'x': off by 1.00e+00",
            "*_ crash.py, eager _*",
            "INCONCLUSIVE: crashed: the process died of signal 6 (SIGABRT) (gradctl explain GC801)",
            "*Captured details call*",
            "so far",
            "FAILED gradctl.toml::wrong.py[[]eager] - GC408 3 of 3 are wrong",
            "FAILED gradctl.toml::crash.py[[]eager] - GC801 INCONCLUSIVE: crashed: the proc*",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_one_target_is_run_by_its_name_and_all_are_selected_by_the_marker(project):
    project("--gradctl", "gradctl.toml::right.py[trace]").assert_outcomes(passed=1)
    result = project("--gradctl", "--collect-only", "-q", "-m", "gradctl", "-k", "right or branch")
    assert result.outlines[:3] == [f"gradctl.toml::{each}" for each in RIGHT_AND_BRANCH]
    result.stdout.fnmatch_lines(["3/6 tests collected (3 deselected) *"])


RIGHT_AND_BRANCH = ["right.py[eager]", "right.py[trace]", "branch.py[export]"]


def test_without_the_option_a_configuration_is_no_test(project):
    project().assert_outcomes(passed=1)


def test_the_option_finds_the_configuration_beside_the_tests_that_are_configured(project, pytester):
    pytester.makeini("[pytest]\ntestpaths = tests\n")
    result = project("--gradctl", "--collect-only", "-q")
    assert result.outlines[0] == "tests/test_nothing.py::test_nothing"
    assert result.outlines[1] == "gradctl.toml::right.py[eager]"


def test_a_form_that_was_not_named_and_cannot_take_the_model_is_a_skip(project, pytester):
    pytester.makefile(".toml", gradctl='forms = ["export"]\n[[targets]]\ntarget = "branch.py"\n')
    result = project("--gradctl", "-rs", "gradctl.toml")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED * torch.export refuses the model: a branch, a loop or a size depends on *"])


def test_a_mistake_in_the_configuration_is_one_sentence(project, pytester):
    pytester.makefile(".toml", gradctl='[[targets]]\ntarget = "right.py"\nforma = ["eager"]\n')
    result = project("--gradctl", "gradctl.toml")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["GC153 *gradctl.toml, line 3: unknown key 'forma' * (did you mean 'forms'[?])*"])
    assert "Traceback" not in result.stdout.str()
