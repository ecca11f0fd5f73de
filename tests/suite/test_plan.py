"""Units as planned from a configuration, and as judged by what it accepts and expects. No process is started here."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from gradctl.core.findings import Finding, TensorResult, Unit
from gradctl.core.names import DEFAULT_FORMS
from gradctl.suite.configuration import Accepted, Configuration, Project, TargetEntry, read_configuration
from gradctl.suite.plan import apply_configuration, note_unused, plan
from gradctl.suite.update_allows import accept_failing, find_unused, rewrite_allows

WRONG = Finding(
    code="GC402",
    severity="error",
    quantity="gradient",
    tensor="param:w",
    error=0.5,
    allow="GC402:param:w",
    message="off.",
)
SLOPE = Finding(code="GC408", severity="error", quantity="gradient", error=0.8751, allow="GC408:Leaky", message="off.")
SPOILED = msgspec.structs.replace(WRONG, code="GC401", cause="GC408", allow="GC401:param:w")
NOTE = Finding(code="GC404", severity="note", message="cut.")


def planned(*, allow=(), forms=("export",), overrides=None, **entry):
    """Return the units of one target."""
    configuration = Configuration(targets=(TargetEntry(target="net.py", forms=forms, **entry),), allow=tuple(allow))
    project = Project(Path.cwd() / "gradctl.toml", configuration)
    return plan(project, configuration.targets, **(overrides or {}))


def unit_of(each, *findings, budget=1e-6, status="complete"):
    """Return what a process gives: its findings with the allows of its request applied."""
    texts = each.request.allows
    marked = tuple(msgspec.structs.replace(f, allowed=f.allow in texts or f.code in texts) for f in findings)
    loud = [f for f in marked if f.severity == "error" and not f.allowed]
    rows = tuple(
        TensorResult(quantity="gradient", tensor=f.tensor, verdict="wrong", shape=(1,), dtype="float32", budget=budget)
        for f in findings
        if f.tensor
    )
    verdict = "fail" if loud else "pass" if status == "complete" else "inconclusive"
    return Unit(target="net.py", form=each.form, verdict=verdict, status=status, findings=marked, tensors=rows)


def accepted(error=None, finding="GC402:param:w", **more):
    return Accepted(finding=finding, error=error, **more)


def test_a_target_runs_in_all_forms_unless_something_says_which():
    entry = TargetEntry(target="net.py")
    project = Project(Path.cwd() / "gradctl.toml", Configuration(targets=(entry,)))
    assert [each.form for each in plan(project, [entry])] == list(DEFAULT_FORMS)
    assert not any(each.request.named for each in plan(project, [entry]))
    general = Project(project.file, Configuration(forms=("eager", "trace")))
    assert [each.form for each in plan(general, [entry])] == ["eager", "trace"]
    own = TargetEntry(target="net.py", forms=("export", "trace"))
    assert [each.form for each in plan(general, [own], forms=["export"])] == ["export"]
    assert all(each.request.named for each in plan(general, [own]))


def test_keywords_choose_by_target_and_form():
    entries = [TargetEntry(target="net.py"), TargetEntry(target="other.py", name="Wide")]
    project = Project(Path.cwd() / "gradctl.toml", Configuration())
    found = {(each.title, each.form) for each in plan(project, entries, keywords=["wide] TRACE", "net.py eager"])}
    assert found == {("other.py[Wide]", "trace"), ("net.py", "eager")}


def test_what_is_said_nearer_holds():
    configuration = Configuration(timeout=10.0, memory="1GiB", seed=3, threads=2, fail_on="note")
    project = Project(Path("/models/gradctl.toml"), configuration)
    entry = TargetEntry(
        target="net.py", timeout=20.0, seed=0, args={"n": 4, "act": "relu"}, inputs="x.npz", forms=("eager",)
    )
    (each,) = plan(project, [entry])
    request = each.request
    assert (request.timeout_seconds, request.memory_limit_bytes, request.fail_on) == (20.0, 2**30, "note")
    assert (request.checking.seed, request.checking.threads) == (0, 2)
    assert request.checking.arguments == ("n=4", "act='relu'")
    assert request.checking.inputs_file == Path("/models/x.npz")
    (each,) = plan(project, [entry], timeout=5.0, memory=7, fail_on="error", allows=("GC404",))
    request = each.request
    assert (request.timeout_seconds, request.memory_limit_bytes, request.fail_on) == (5.0, 7, "error")
    assert request.allows == ("GC404",)


@pytest.mark.parametrize(
    ("target", "form", "is_for_it"),
    [
        ("*", None, True),
        ("net.py", "export", True),
        ("net.py[a]", None, True),
        ("net.py[b]", None, False),
        ("n*.py", None, True),
        ("other.py", None, False),
        ("net.py", "trace", False),
    ],
)
def test_an_entry_is_for_the_targets_and_forms_that_it_names(target, form, is_for_it):
    (each,) = planned(allow=[accepted(target=target, form=form)], name="a")
    assert (each.request.allows == ("GC402:param:w",)) is is_for_it


@pytest.mark.parametrize(
    ("limit", "error", "verdict"),
    [
        (None, 0.5, "pass"),
        (0.5, 0.5, "pass"),
        (0.499, 0.5, "pass"),  # within 1 %
        (0.49, 0.5, "fail"),
        (1e-7, 1e-6, "pass"),  # within rounding
        (1e-7, 2e-6, "fail"),
        (0.5, "inf", "fail"),
        (0.5, "nan", "fail"),
        (0.5, None, "fail"),  # no longer a matter of size
        (None, "inf", "pass"),
    ],
)
def test_what_gets_worse_fails_again(limit, error, verdict):
    (each,) = planned(allow=[accepted(limit)])
    unit = apply_configuration(each, unit_of(each, msgspec.structs.replace(WRONG, error=error)))
    assert (unit.verdict, unit.findings[0].allowed) == (verdict, verdict == "pass")
    assert ("accepted is" in unit.findings[0].message) == (verdict == "fail")


def test_one_of_several_entries_is_enough():
    (each,) = planned(allow=[accepted(0.1), accepted(0.6)])
    assert apply_configuration(each, unit_of(each, WRONG)).verdict == "pass"


def test_an_expected_failure_passes_and_its_findings_are_accepted():
    (each,) = planned(expect={"export": "fail"})
    unit = apply_configuration(each, unit_of(each, WRONG, NOTE))
    assert (unit.verdict, unit.expected, [f.allowed for f in unit.findings]) == ("pass", "fail", [True, False])


@pytest.mark.parametrize(
    ("expected", "status"), [("fail", "complete"), ("skipped", "crashed"), ("inconclusive", "complete")]
)
def test_an_expectation_that_stops_being_true_fails(expected, status):
    (each,) = planned(expect={"export": expected})
    unit = apply_configuration(each, unit_of(each, status=status))
    assert (unit.verdict, unit.findings[0].code, unit.findings[0].severity) == ("fail", "GC152", "error")


def test_a_unit_is_called_by_the_name_of_its_entry():
    (one,) = planned(name="one")
    (two,) = planned(name="two")
    units = [apply_configuration(each, unit_of(each, WRONG)) for each in (one, two)]
    assert [unit.target for unit in units] == ["net.py[one]", "net.py[two]"]
    assert units[0].findings[0].fingerprint != units[1].findings[0].fingerprint


def test_an_entry_that_accepts_nothing_is_noted_where_all_it_is_for_ran():
    both = planned(allow=[accepted(form="export"), accepted(finding="GC301")], forms=("export", "trace"))
    units = [apply_configuration(each, unit_of(each)) for each in both]
    noted, allowances = note_unused(both, units, ())
    assert [[f.message for f in unit.findings] for unit in noted] == [
        ["allow GC402:param:w accepted nothing in this run.", "allow GC301 accepted nothing in this run."],
        [],
    ]
    assert [(each.allow, each.applied) for each in allowances] == [("GC402:param:w", False), ("GC301", False)]
    assert [unit.verdict for unit in noted] == ["pass", "pass"]
    crashed = [units[0], apply_configuration(both[1], unit_of(both[1], status="crashed"))]
    noted, _ = note_unused(both, crashed, ())
    assert [len(unit.findings) for unit in noted] == [1, 0]


def test_an_entry_is_of_no_use_only_where_all_it_is_for_ran():
    entry = TargetEntry(target="net.py", forms=("eager", "export"))
    known = accepted(finding="GC408", target="*.py")
    project = Project(Path.cwd() / "gradctl.toml", Configuration(targets=(entry,), allow=(known,)))
    every = plan(project, [entry])
    part = plan(project, [entry], forms=["export"])
    found = [apply_configuration(part[0], unit_of(part[0]))]
    assert find_unused(project, part, found, every) == []
    assert not note_unused(part, found, (), every)[0][0].findings
    all_of_it = [apply_configuration(each, unit_of(each)) for each in every]
    assert find_unused(project, every, all_of_it, every) == [known]


def test_a_note_fails_where_notes_fail():
    given = planned(overrides={"allows": ("GC301",), "fail_on": "note"})
    noted, _ = note_unused(given, [apply_configuration(given[0], unit_of(given[0]))], ("GC301",))
    assert (noted[0].verdict, noted[0].findings[0].message) == ("fail", "--allow GC301 accepted nothing in this run.")


def test_what_fails_is_accepted_round_by_round():
    """The Function first; what is behind it only if it still fails then."""
    units = planned()

    def run(some):
        behind = [] if any("GC408:Leaky" in each.request.allows for each in some) else [SPOILED]
        return [apply_configuration(each, unit_of(each, SLOPE, WRONG, *behind)) for each in some]

    plan_now, now, entries = accept_failing(units, run(units), run)
    assert [unit.verdict for unit in now] == ["pass"]
    assert entries == [
        Accepted(finding="GC408:Leaky", target="net.py", form="export", error=0.876),
        Accepted(finding="GC402:param:w", target="net.py", form="export", error=0.5),
    ]
    assert set(plan_now[0].request.allows) == {"GC408:Leaky", "GC402:param:w"}


def test_what_cannot_be_accepted_still_fails():
    units = planned(expect={"export": "fail"})
    found = [apply_configuration(units[0], unit_of(units[0]))]
    _, now, entries = accept_failing(units, found, lambda some: pytest.fail("nothing to run again"))
    assert (now[0].verdict, entries) == ("fail", [])


TEXT = """# what we know
jobs = 2  # two

[[targets]]
target = "net.py"  # ours

# why
[[allow]]
finding = "GC402:param:w"
target = "net.py"
form = "export"
error = 0.1

[[allow]]
finding = "GC301"
target = "net.py"
"""


def as_written(tmp_path, text, name="gradctl.toml", **changes):
    path = tmp_path / name
    path.write_text(text)
    path.write_text(rewrite_allows(path, text, **changes))
    return path.read_text(), read_configuration(path).configuration


def test_an_entry_is_replaced_one_is_taken_out_and_all_else_stays(tmp_path):
    worse, other = accepted(0.5, target="net.py", form="export"), accepted(finding="GC401", target="a.py")
    gone = Accepted(finding="GC301", target="net.py")
    text, configuration = as_written(tmp_path, TEXT, add=[worse, other], drop=[gone])
    assert configuration.allow == (worse, other)
    assert configuration.targets == (TargetEntry(target="net.py"),)
    assert text.startswith('# what we know\njobs = 2  # two\n\n[[targets]]\ntarget = "net.py"  # ours\n')
    assert text.endswith('error = 0.5\n\n[[allow]]\nfinding = "GC401"\ntarget = "a.py"\n')


def test_a_new_file_is_made(tmp_path):
    text, configuration = as_written(tmp_path, "", add=[accepted(0.5, target="net.py", form="export")], drop=[])
    assert text == '[[allow]]\nfinding = "GC402:param:w"\ntarget = "net.py"\nform = "export"\nerror = 0.5\n'
    assert len(configuration.allow) == 1


def test_pyproject_gets_its_table(tmp_path):
    text, configuration = as_written(
        tmp_path, '[project]\nname = "net"\n\n[tool.gradctl]\njobs = 3\n', "pyproject.toml", add=[accepted()], drop=[]
    )
    assert (configuration.jobs, configuration.allow) == (3, (accepted(),))
    assert text.startswith('[project]\nname = "net"\n') and "[[tool.gradctl.allow]]" in text
    text, configuration = as_written(tmp_path, '[project]\nname = "net"\n', "pyproject.toml", add=[accepted()], drop=[])
    assert configuration.allow == (accepted(),)


def test_inline_entries_stay_inline(tmp_path):
    text, configuration = as_written(tmp_path, 'allow = [\n  {finding = "GC301"}, # c\n]\n', add=[accepted()], drop=[])
    assert configuration.allow == (Accepted(finding="GC301"), accepted())
    assert "# c" in text and "[[" not in text


@pytest.mark.parametrize(
    "text",
    [
        'tool.gradctl.forms = ["eager"]\ntool.gradctl.jobs = 2\n\n[project]\nname = "x"\n',
        "[tool]\ngradctl.jobs = 2\nruff.x = 1\n",
        '[tool]\ngradctl = {forms = ["eager"], jobs = 1}  # short\n',
        "tool = {gradctl = {jobs = 1}}\n",
        '[tool.gradctl]\njobs = 1\n[tool.a]\nx = 1\n[[tool.gradctl.targets]]\ntarget = "a.py"\n[tool.b]\ny = 1\n',
        "[tool.gradctl]\nallow = []\n[tool.a]\nx = 1\n",
    ],
)
def test_however_it_is_laid_out_nothing_but_the_entries_changes(text, tmp_path):
    before, known = tomllib.loads(text), accepted(0.5, target="net.py", form="export")
    table = before["tool"]["gradctl"]
    table["allow"] = [{"finding": known.finding, "target": "net.py", "form": "export", "error": 0.5}]
    written, configuration = as_written(tmp_path, text, "pyproject.toml", add=[known], drop=[])
    assert tomllib.loads(written) == before
    again, _ = as_written(tmp_path, written, "pyproject.toml", add=[known], drop=[])
    assert tomllib.loads(again) == before
    gone, configuration = as_written(tmp_path, written, "pyproject.toml", add=[], drop=[known])
    assert configuration.allow == () and "GC402" not in gone


def test_ends_of_lines_stay_what_they_are(tmp_path):
    path, text = tmp_path / "gradctl.toml", TEXT.replace("\n", "\r\n")
    written = rewrite_allows(path, text, add=[accepted(finding="GC401")], drop=[])
    assert written.startswith(text[: text.index("target")]) and written.count("\n") == written.count("\r\n")


def test_what_was_written_meanwhile_stays(tmp_path):
    """The text is read anew: a run takes long."""
    meanwhile = accepted(finding="GC404", target="new.py")
    text = TEXT.replace("# why", '[[allow]]\nfinding = "GC404"\ntarget = "new.py"\n\n# why')
    _, configuration = as_written(tmp_path, text, add=[], drop=[Accepted(finding="GC301", target="net.py")])
    assert meanwhile in configuration.allow and len(configuration.allow) == 2


def test_of_two_findings_that_one_entry_accepts_the_larger_counts():
    larger = msgspec.structs.replace(WRONG, error=0.7)
    units = planned()
    found = [apply_configuration(units[0], unit_of(units[0], larger, WRONG))]
    _, _, entries = accept_failing(
        units, found, lambda some: [apply_configuration(e, unit_of(e, larger, WRONG)) for e in some]
    )
    assert [each.error for each in entries] == [0.7]


def test_entries_without_use_are_those_that_accepted_nothing():
    used, unused = accepted(), accepted(finding="GC301")
    units = planned(allow=[used, unused])
    found = [apply_configuration(units[0], unit_of(units[0], WRONG))]
    project = Project(Path("gradctl.toml"), Configuration(allow=(used, unused)))
    assert find_unused(project, units, found) == [unused]
