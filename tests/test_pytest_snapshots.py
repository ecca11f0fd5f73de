"""Snapshots of the fixture ``gradctl``: missing, written, verified, rewritten, and without a test."""

from __future__ import annotations

import pytest

from tests.test_pytest_plugin import run, run_forked  # noqa: F401  # a fixture, and what it uses

pytest_plugins = "pytester"

TESTS = """
SCALE = 1.0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return SCALE * self.fc(x)


class TestScaled:
    @pytest.mark.parametrize("width", ["a/b", "A"])
    def test_forward(self, gradctl, width):
        gradctl.snapshot(Scaled(), X)


def test_two(gradctl):
    gradctl.snapshot(Scaled(), X)
    gradctl.snapshot(Scaled(), 2 * X)
    gradctl.snapshot(Scaled(), 3 * X, name="third")
"""


def snapshots(pytester):
    return sorted(path.name for path in pytester.path.rglob("__snapshots__/*/*.snapshot"))


def test_a_missing_snapshot_fails_the_test_and_is_not_written(run, pytester):  # noqa: F811
    result = run(TESTS)
    result.assert_outcomes(failed=3)
    said = (
        "Failed: there is no snapshot __snapshots__/*/test_two.snapshot. Run pytest with --gradctl-update, and commit *"
    )
    result.stdout.fnmatch_lines([">       gradctl.snapshot(Scaled(), X)", f"E       {said}"])
    assert snapshots(pytester) == []


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "1"]], ids=["one process", "xdist"])
def test_update_writes_one_file_for_each_call_and_says_so(run, pytester, options):  # noqa: F811
    written = run(TESTS, "--gradctl-update", *options)
    written.assert_outcomes(passed=3)
    assert sum(line.startswith("gradctl: ") and line.endswith(" was written.") for line in written.outlines) == 5
    names = snapshots(pytester)
    assert [name for name in names if name.startswith("test_two")] == [
        "test_two.2.snapshot",
        "test_two.snapshot",
        "test_two.third.snapshot",
    ]
    assert len(names) == 5
    if not options:
        result = run(TESTS)
        result.assert_outcomes(passed=3)
        assert "gradctl: " not in result.stdout.str()


def test_a_change_fails_the_test_until_the_snapshot_is_rewritten(run, pytester):  # noqa: F811
    def only_two(scale, *options):
        return run(TESTS.replace("SCALE = 1.0", f"SCALE = {scale}"), "-k", "two", *options)

    only_two(1.0, "--gradctl-update").assert_outcomes(passed=1, deselected=2)
    changed = only_two(1.0001)
    changed.assert_outcomes(failed=1, deselected=2)
    changed.stdout.fnmatch_lines(
        [
            ">       gradctl.snapshot(Scaled(), X)",
            "E       gradctl.CheckFailed: FAIL: 3 of 3 gradients changed (gradctl explain GC311)",
            "E         error GC311 the gradient of param:fc.weight changed in float64: relative error",
            "If this change is intended, run pytest with --gradctl-update, and commit the file.",
        ]
    )
    rewritten = only_two(1.0001, "--gradctl-update")
    rewritten.assert_outcomes(passed=1, deselected=2)
    rewritten.stdout.fnmatch_lines(
        ["gradctl: *test_two.snapshot was rewritten, which changes 4 tensors, the worst is *"]
    )
    only_two(1.0001).assert_outcomes(passed=1, deselected=2)


def test_a_snapshot_without_a_test_is_reported_unless_only_some_tests_are_named(run, pytester, request):  # noqa: F811
    name = request.node.originalname
    folder = pytester.path / "__snapshots__" / name
    folder.mkdir(parents=True)
    for file in ("test_old.snapshot", "test_empty.snapshot", "test_empty.2.snapshot", "test_empty.third.snapshot"):
        (folder / file).touch()
    test = "def test_empty():\n    pass\n"
    result = run(test)
    line = f"gradctl: the snapshot __snapshots__/{name}/test_old.snapshot belongs to no test. Remove it."
    assert [each for each in result.outlines if each.startswith("gradctl: ")] == [line]
    assert "gradctl: " not in run(test, f"{name}.py::test_empty").stdout.str()


def test_two_snapshots_of_one_name_in_a_test_are_refused(run):  # noqa: F811
    result = run(
        TESTS.partition("class TestScaled")[0]
        + "def test_it(gradctl):\n"
        + "    gradctl.snapshot(Scaled(), X, name='it')\n" * 2,
        "--gradctl-update",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E       Failed: this test has two snapshots of the name 'it'. Give each its own name."]
    )
