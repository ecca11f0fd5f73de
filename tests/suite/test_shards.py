"""Shards: each unit is in one, the work is balanced, and the merged report is that of one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradctl.core.assembly import assemble_report
from gradctl.core.errors import GradctlError, TargetError
from gradctl.core.findings import Finding, Location, Unit
from gradctl.report.machine.json import load, render
from gradctl.suite.configuration import parse_configuration
from gradctl.suite.discovery import select_entries
from gradctl.suite.plan import note_unused, plan
from gradctl.suite.shards import describe_shard, merge, select_shard
from tests.cli.command_line import gradctl

CONFIGURATION = """
forms = ["eager", "export", "onnx"]
[[targets]]
target = "net:a"
allow = ["GC404:param:w"]
[[targets]]
target = "net:b"
fail-on = "note"
[[targets]]
target = "net:c"
[[allow]]
finding = "GC402"
target = "net:[bc]"
form = "export"
"""
PROJECT = parse_configuration(Path("gradctl.toml"), CONFIGURATION)
PLANNED = plan(PROJECT, select_entries(PROJECT, ()), allows=["GC418"])


def planned_of(count):
    text = "".join(f'[[targets]]\ntarget = "net:m{number}"\n' for number in range(count))
    project = parse_configuration(Path("gradctl.toml"), f'forms = ["eager"]\n{text}')
    return plan(project, select_entries(project, ()))


def unit(planned, status, codes):
    """A unit that ran: judged, or not complete, with findings that an entry may accept."""
    found = tuple(Finding(code=code, severity="error", message="m", allowed=True) for code in codes)
    verdict = "pass" if status == "complete" else "inconclusive"
    return Unit(target=planned.title, form=planned.form, verdict=verdict, status=status, findings=found)


def reported(planned, units, whole, shard=None):
    noted, allows = note_unused(planned, units, ["GC418"], whole)
    report = assemble_report("check", noted, allows, seed=0)
    return report if shard is None else msgspec.structs.replace(report, shard=shard)


def shards_of(units, count):
    reports = {}
    for index in range(1, count + 1):
        positions = select_shard(PLANNED, index, count)
        shard = describe_shard(index, count, PLANNED, positions, everywhere=["GC418"], every=PLANNED)
        report = reported([PLANNED[k] for k in positions], [units[k] for k in positions], PLANNED, shard)
        reports[f"{index}.json"] = load(render(report).encode())
    return reports


some_units = st.tuples(
    *(
        st.builds(
            lambda status, codes, each=each: unit(each, status, codes),
            st.sampled_from(["complete", "complete", "crashed"]),
            st.sets(st.sampled_from(["GC402", "GC404", "GC418"]), max_size=1),
        )
        for each in PLANNED
    )
)


@pytest.mark.fast
@given(some_units, st.integers(1, len(PLANNED)), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_merged_report_is_that_of_one_run(units, count, random):
    shards = list(shards_of(units, count).items())
    random.shuffle(shards)
    assert merge(dict(shards)) == reported(PLANNED, units, PLANNED)


@pytest.mark.fast
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_each_unit_is_in_one_shard_and_the_work_is_balanced(seconds, data):
    planned = planned_of(len(seconds))
    count = data.draw(st.integers(1, len(seconds)))
    units = [
        Unit(target=each.title, form="eager", verdict="pass", seconds=s)
        for each, s in zip(planned, seconds, strict=True)
    ]
    report = assemble_report("check", units, (), seed=0)
    shards = [select_shard(planned, index, count, report) for index in range(1, count + 1)]
    assert sorted(position for shard in shards for position in shard) == list(range(len(seconds)))
    largest = max(sum(seconds[position] for position in shard) for shard in shards)
    assert largest <= 4 / 3 * max(sum(seconds) / count, *seconds, _pair(seconds, count)) * (1 + 1e-9)


def _pair(seconds, count):
    """A bound of the best division: with more units than shards, two of the count + 1 longest are in one shard."""
    longest = sorted(seconds, reverse=True)
    return sum(longest[count - 1 : count + 1]) if len(seconds) > count else 0.0


@pytest.mark.fast
def test_without_durations_shards_differ_by_one_unit_at_most():
    sizes = [len(select_shard(planned_of(10), index, 4)) for index in range(1, 5)]
    assert sizes == [3, 3, 2, 2]


@pytest.mark.fast
def test_more_shards_than_units_are_refused():
    with pytest.raises(TargetError, match=r"GC110 --shard 1/3 has no unit: the run has 2\."):
        select_shard(planned_of(2), 1, 3)


def shards(count=3):
    return shards_of([unit(each, "complete", ()) for each in PLANNED], count)


def test_a_shard_that_is_missing_or_there_twice_is_refused():
    first, second, third = shards().values()
    with pytest.raises(GradctlError, match=r"GC156 .* shard 3/3 is missing"):
        merge({"a": first, "b": second})
    with pytest.raises(GradctlError, match=r"GC156 .* shard 1/3 is there 2 times"):
        merge({"a": first, "b": first, "c": second, "d": third})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: msgspec.structs.replace(r, seed=1), "seed 1, there 0"),
        (lambda r: msgspec.structs.replace(r, command="compare"), "command compare, there check"),
        (lambda r: msgspec.structs.replace(r, environment={**r.environment, "torch": "2.9"}), "torch 2.9, there "),
        (lambda r: msgspec.structs.replace(r, shard=msgspec.structs.replace(r.shard, plan="")), "units, options"),
        (lambda r: msgspec.structs.replace(r, shard=None), "'a' is a shard of a run, and 'b' is not"),
    ],
)
def test_reports_of_other_runs_are_refused(change, said):
    first, second = shards(2).values()
    with pytest.raises(GradctlError, match=f"GC156 .*{said}"):
        merge({"a": first, "b": change(second)})


def test_shards_of_other_durations_are_refused():
    first, second = shards(2).values()
    moved = msgspec.structs.replace(second.shard, positions=first.shard.positions[: len(second.units)])
    with pytest.raises(GradctlError, match=r"GC156 .* is in 'a' and 'b'"):
        merge({"a": first, "b": msgspec.structs.replace(second, shard=moved)})


def test_reports_without_shards_are_joined_unless_they_share_a_unit():
    units = [unit(each, "complete", ()) for each in PLANNED]
    parts = [assemble_report("check", some, (), seed=0) for some in (units[:4], units[4:])]
    assert merge({"a": parts[0], "b": parts[1]}) == assemble_report("check", units, (), seed=0)
    with pytest.raises(GradctlError, match=r"GC156 .* net:a eager is in 'a' and 'b'"):
        merge({"a": parts[0], "b": parts[0]})


def test_an_interrupted_shard_makes_the_run_an_interrupted_one():
    units = [unit(each, "complete", ()) for each in PLANNED]
    first, second = shards_of(units, 2).values()
    cut = msgspec.structs.replace(
        second,
        status="interrupted",
        units=second.units[:1],
        planned=len(second.units),
        shard=msgspec.structs.replace(second.shard, positions=second.shard.positions[:1]),
    )
    merged = merge({"a": first, "b": cut})
    assert (merged.status, merged.verdict, merged.planned) == ("interrupted", "inconclusive", len(PLANNED))


@pytest.mark.parametrize("text", ["5/4", "0/4", "1", "1/0", "a/b", "-1/4"])
def test_a_shard_that_is_none_of_the_run_is_refused(tmp_path, text):
    finished = gradctl("check", "--shard", text, cwd=tmp_path)
    assert finished.returncode == 2
    assert f"'{text}' is not I/N with I from 1 to N, for example 2/4." in " ".join(finished.stderr.split())


@pytest.mark.slow
def test_two_shards_of_real_models_have_the_report_of_one_run(tmp_path):
    samples = Path(__file__).parents[2] / "sample_models"
    for name in ("linear.py", "mlp.py", "wrong_backward.py"):
        shutil.copy(samples / name, tmp_path)
    run = ("check", ".", "--form", "eager", "--form", "export", "--allow", "GC404")
    whole = gradctl(*run, "--report", "json=whole.json", cwd=tmp_path)
    for index in (1, 2):
        part = ("--shard", f"{index}/2", "--durations", "whole.json")
        gradctl(*run, *part, "--report", f"json={index}.json", cwd=tmp_path)
    merged = gradctl("report", "2.json", "1.json", "--merge", "--format", "json", cwd=tmp_path)
    assert merged.returncode == whole.returncode == 1
    assert _without_time(json.loads(merged.stdout)) == _without_time(json.loads((tmp_path / "whole.json").read_text()))


def _without_time(value):
    if isinstance(value, list):
        return [_without_time(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_time(each) for key, each in value.items() if key not in ("seconds", "timing")}
    return value


def test_the_merged_report_has_the_source_lines_of_all(tmp_path):
    (tmp_path / "net.py").write_text("one\ntwo\nthree\n", encoding="utf-8")
    units = []
    for number in (3, 1):
        place = Location(file=str(tmp_path / "net.py"), line=number)
        finding = Finding(code="GC408", severity="error", message="m", location=place)
        units.append(Unit(target=f"net:{number}", form="eager", verdict="fail", findings=(finding,)))
    reports = {each.target: assemble_report("check", [each], (), seed=0) for each in units}
    (tmp_path / "net.py").unlink()
    assert [each.line for each in merge(reports).sources] == [3, 1]
