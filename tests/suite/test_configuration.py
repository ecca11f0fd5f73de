"""Configurations as files: what they say, and what is said of one that is none, with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradctl.core.errors import TargetError
from gradctl.suite.configuration import (
    Accepted,
    TargetEntry,
    find_configuration,
    options_of,
    parse_size,
    read_configuration,
)

WHOLE = """
jobs = 3
forms = ["eager", "export"]
timeout = 20.5
fail-on = "warning"

[[targets]]
target = "net.py:make_model"
name = "wide"
args = {width = 4, act = "relu", bias = true}
input = ["x=f32[8,4]"]
train = true
memory = "2GiB"
expect = {export = "fail"}
allow = ["GC408:Round"]

[[allow]]
finding = "GC402:param:fc.weight"
target = "net.py:*"
form = "export"
error = 0.25
reason = "known"
"""


def written(tmp_path, text, name="gradctl.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_that_can_be_said(tmp_path):
    configuration = read_configuration(written(tmp_path, WHOLE)).configuration
    (entry,) = configuration.targets
    assert (configuration.jobs, configuration.forms, configuration.fail_on) == (3, ("eager", "export"), "warning")
    assert entry == TargetEntry(
        target="net.py:make_model",
        name="wide",
        args={"width": 4, "act": "relu", "bias": True},
        input=("x=f32[8,4]",),
        train=True,
        memory="2GiB",
        expect={"export": "fail"},
        allow=("GC408:Round",),
    )
    assert entry.title == "net.py:make_model[wide]"
    assert configuration.allow == (
        Accepted(finding="GC402:param:fc.weight", target="net.py:*", form="export", error=0.25, reason="known"),
    )


@pytest.mark.parametrize(
    ("shared", "own", "training"),
    [
        ("", "", None),
        ("", 'mode = "eval"', False),
        ("", 'mode = "train"', True),
        ("", "train = false", False),
        ('mode = "eval"', "", False),
        ('mode = "eval"', 'mode = "train"', True),
        ('mode = "train"', "train = false", False),
    ],
)
def test_the_mode_of_a_target_overrides_that_of_all_targets(shared, own, training, tmp_path):
    project = read_configuration(written(tmp_path, f'{shared}\n[[targets]]\ntarget = "net.py"\n{own}\n'))
    assert options_of(project, project.configuration.targets[0]).training is training


def test_pyproject_has_it_in_its_table(tmp_path):
    table = WHOLE.replace("[[", "[[tool.gradctl.")
    path = written(tmp_path, f'[project]\nname = "net"\n[tool.gradctl]\n{table}', "pyproject.toml")
    assert read_configuration(path).configuration == read_configuration(written(tmp_path, WHOLE)).configuration


def test_the_nearest_configuration_upwards_is_found(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    outer = written(tmp_path, "")
    written(tmp_path / "a", "[tool.other]\n", "pyproject.toml")
    assert find_configuration(inner) == outer
    nearer = written(tmp_path / "a", "[tool.gradctl]\n", "pyproject.toml")
    assert find_configuration(inner) == nearer
    assert find_configuration(inner) != written(inner, "")
    assert find_configuration(inner) == inner / "gradctl.toml"


WRONG = {
    "an unknown key": ("jobs = 2\n\nfroms = []\n", "line 3: unknown key 'froms' (did you mean 'forms'?)."),
    "an unknown key of a target": (
        '[[targets]]\ntarget = "a.py"\n[[targets]]\n# c\ntarget = "b.py"\n# d\nfrom = []\n',
        "line 7: unknown key 'from' in targets (did you mean 'forms'?).",
    ),
    "a key unlike all": ("zzz = 1\n", "line 1: unknown key 'zzz'; known keys: forms, seed, device, "),
    "an unknown key of an allow": (
        '[[allow]]\nfinding = "GC401"\nerorr = 1.0\n',
        "line 3: unknown key 'erorr' in allow (did you mean 'error'?).",
    ),
    "an unknown form": (
        'jobs = 1\nforms = [\n  "eager",\n  "exprot",\n]\n',
        "line 2: 'exprot' is not a value of forms (did you mean 'export'?).",
    ),
    "an unknown form in expect": (
        '[[targets]]\ntarget = "a.py"\nexpect = {exprot = "fail"}\n',
        "line 3: 'exprot' is not a value of expect (did you mean 'export'?).",
    ),
    "an unknown verdict": (
        '[[targets]]\ntarget = "a.py"\n[targets.expect]\nexport = "fial"\n',
        "line 3: 'fial' is not a value of expect (did you mean 'fail'?).",
    ),
    "a wrong type": ('jobs = "2"\n', "line 1: jobs: expected `integer`, got `string`."),
    "no target": ('[[targets]]\nname = "a"\n', "line 1: an entry of targets lacks 'target'."),
    "an allow that is a word": ('allow = ["GC401"]\n', "line 1: allow: expected `table`, got `string`."),
    "an allow without a rule": (
        '[[allow]]\nfinding = "Round"\n',
        "line 2: 'Round' is not CODE or CODE:NAME, for example GC408:RoundStraightThrough.",
    ),
    "a rule that there is not": ('[[allow]]\nfinding = "GC499"\n', "line 2: no rule 'GC499' "),
    "a negative error": (
        '[[allow]]\nfinding = "GC401"\nerror = -1.0\n',
        "line 3: error = -1.0 is not the size of an error; ",
    ),
    "an error that is no number": (
        '[[allow]]\nfinding = "GC401"\nerror = nan\n',
        "line 3: error = nan is not the size of an error; ",
    ),
    "a target twice": (
        '[[targets]]\ntarget = "a.py"\n[[targets]]\ntarget = "a.py"\n',
        "line 4: 'a.py' is listed twice; add a unique name to each entry (name = …).",
    ),
    "two modes": (
        '[[targets]]\ntarget = "a.py"\nmode = "eval"\ntrain = false\n',
        "line 4: 'train' and 'mode' both set the mode; remove 'train'.",
    ),
    "an unknown mode": ('mode = "evla"\n', "line 1: 'evla' is not a value of mode (did you mean 'eval'?)."),
    "no time": ("timeout = 0\n", "line 1: timeout = 0 is not a duration; use seconds above 0, at most 1e+06."),
    "no end": ("timeout = 1e12\n", "line 1: timeout = 1e+12 is not a duration; use seconds above 0, at most 1e+06."),
    "too many threads": ("threads = 100000\n", "line 1: threads = 100000 is too large; the maximum is 1024."),
    "no threads": ("threads = 0\n", "line 1: threads = 0 is too small; the minimum is 1."),
    "one size": (
        '[[targets]]\ntarget = "a.py"\nmax-sizes = 1\n',
        "line 3: max-sizes = 1 is too small; the minimum is 2.",
    ),
    "no jobs": ("jobs = 0\n", "line 1: jobs = 0 is too small; the minimum is 1."),
    "no size": ('memory = "8 bananas"\n', "line 1: '8 bananas' is not a size. Write, for example, 8GiB or 500MB."),
    "a list": ("[[gradctl]]\n", "line 1: unknown key 'gradctl'; known keys: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_line(name, tmp_path):
    text, said = WRONG[name]
    path = written(tmp_path, text)
    with pytest.raises(TargetError) as caught:
        read_configuration(path)
    assert (caught.value.code, caught.value.exit_code) == ("GC153", 2)
    assert caught.value.message.startswith(f"{path}, {said}")


@pytest.mark.parametrize(
    "text", ["a = [", "jobs = 1\njobs = 2\n", f"jobs = {'9' * 5000}", '"', "a" * 100, "x = " + "[" * 5000]
)
def test_what_is_no_toml_is_named(text, tmp_path):
    with pytest.raises(TargetError, match=r"gradctl\.toml is not TOML: "):
        read_configuration(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TargetError, match="cannot be read: No such file"):
        read_configuration(tmp_path / "none.toml")
    with pytest.raises(TargetError, match="cannot be read: Is a directory"):
        read_configuration(tmp_path)
    (tmp_path / "gradctl.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TargetError, match="is not TOML: it is not UTF-8"):
        read_configuration(tmp_path / "gradctl.toml")


def test_a_table_that_is_no_table(tmp_path):
    with pytest.raises(TargetError, match="line 2: "):
        read_configuration(written(tmp_path, "[tool]\ngradctl = 3\n", "pyproject.toml"))


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5 kB", 1500), (4096, 4096), ("64", 64)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@given(st.text())
def test_any_text_is_read_or_named(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "gradctl.toml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    try:
        read_configuration(path)
    except TargetError as error:
        assert error.message.startswith(str(path))


def test_the_line_is_found_far_down(tmp_path):
    entries = "".join(f'[[targets]]\ntarget = "a{number}.py"\n\n' for number in range(300))
    with pytest.raises(TargetError, match="line 904: unknown key 'froms' in targets"):
        read_configuration(
            written(
                tmp_path,
                f'{entries}# one more\n[[targets]]\ntarget = "b.py"\nfroms = []\n[[allow]]\nfinding = "GC401"\n',
            )
        )


@pytest.mark.parametrize("size", ["", "0", "9" * 400 + "GiB", "-1", "1e3", "8 bananas"])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(size)


def test_the_example_of_the_readme_is_a_configuration(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall("```toml\n(.*?)```", readme, re.DOTALL)
    configuration = read_configuration(written(tmp_path, example)).configuration
    assert [entry.expect for entry in configuration.targets] == [{"compile": "fail"}]
    assert [accepted.error for accepted in configuration.allow] == [0.9]
