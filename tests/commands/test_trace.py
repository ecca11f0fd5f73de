"""A file takes its place only if it verified: what is held against eager is the file, read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gradctl.commands.compare import Comparing
from gradctl.commands.trace import trace
from gradctl.core.allows import Allows
from gradctl.core.errors import NothingToCheck, TargetError
from gradctl.forms.artifact import ensure_fits, load
from gradctl.forms.table import form_named
from gradctl.subject.subject import Subject

FORMS = {"trace": "net.pt", "script": "net.pt", "export": "net.pt2"}


class Branching(nn.Module):
    """Doubles a positive sum, halves any other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.fc(x)
        return 2 * h if bool(x.sum() > 0) else h / 2


class Flattening(nn.Module):
    """Fixes its batch size: the trace holds the number, and so does an export."""

    def forward(self, x):
        return x.reshape(int(x.shape[0]) * 4).sin()


def line_of(text):
    """Return the number of the only line of this file that begins with ``text``."""
    (number,) = [k for k, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == text]
    return number


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def subject_of(model, *args):
    generator = torch.Generator().manual_seed(1)
    return Subject(target="net.py:model", model=model, args=args or (torch.randn(5, 4, generator=generator),))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_agrees_takes_its_place(form, tmp_path):
    output = tmp_path / FORMS[form]
    traced = trace(subject_of(two_layers()), output, form=form)
    assert (traced.written, traced.unit.verdict, traced.unit.form) == (True, "pass", form)
    x = torch.randn(5, 4)
    assert torch.equal(load(output, trusted=True).call(x), two_layers()(x))
    assert [file.name for file in tmp_path.iterdir()] == [output.name]


def test_the_graph_is_that_of_the_file(tmp_path):
    graph = trace(subject_of(two_layers()), tmp_path / "net.pt").graph
    assert graph.operators == {"linear": 2, "tanh": 1}
    assert [row.name for row in graph.parameters] == [
        "param:0.weight",
        "param:0.bias",
        "param:2.weight",
        "param:2.bias",
    ]
    assert (graph.elements, graph.bytes) == (4 * 3 + 3 + 3 * 2 + 2, 4 * 23)


def test_a_baked_branch_leaves_no_file(tmp_path):
    traced = trace(subject_of(Branching()), tmp_path / "net.pt")
    assert (traced.written, traced.unit.verdict) == (False, "fail")
    assert {"GC301"} <= {finding.code for finding in traced.unit.findings}
    assert list(tmp_path.iterdir()) == []


def test_a_baked_branch_leaves_an_older_file_as_it_was(tmp_path):
    (tmp_path / "net.pt").write_text("older")
    trace(subject_of(Branching()), tmp_path / "net.pt")
    assert (tmp_path / "net.pt").read_text() == "older"


def test_a_file_that_differs_is_kept_where_that_is_asked(tmp_path):
    traced = trace(subject_of(Branching()), tmp_path / "net.pt", keep_unverified=True)
    assert (traced.written, traced.unit.verdict) == (True, "fail")
    assert load(tmp_path / "net.pt", trusted=True).form == "trace"


def test_the_same_model_without_the_branch_is_silent(tmp_path):
    class Doubling(Branching):
        def forward(self, x):
            return 2 * self.fc(x)

    assert trace(subject_of(Doubling()), tmp_path / "net.pt").written


def test_a_form_that_cannot_take_the_model_says_why(tmp_path):
    (tmp_path / "net.pt2").write_text("older")
    traced = trace(subject_of(Branching()), tmp_path / "net.pt2", form="export")
    assert (traced.written, traced.graph) == (False, None)
    assert (traced.unit.status, traced.unit.verdict) == ("unsupported", "inconclusive")
    assert traced.unit.reason.startswith(
        "torch.export refuses the model: a branch, a loop or a size depends on the values"
    )
    assert (tmp_path / "net.pt2").read_text() == "older"


def test_the_users_model_is_not_changed(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace(subject_of(model), tmp_path / "net.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_gradient_has_nothing_to_verify(tmp_path):
    with pytest.raises(NothingToCheck, match="GC110"):
        trace(subject_of(lambda n: n + 1, torch.arange(3)), tmp_path / "net.pt")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ free sizes


def test_a_free_size_is_tried_at_another_size(tmp_path):
    traced = trace(subject_of(two_layers()), tmp_path / "net.pt2", form="export", dynamic={"input": {0: "batch"}})
    assert traced.written
    assert traced.unit.variations[-1] == "batch + 1"
    assert load(tmp_path / "net.pt2", trusted=True).call(torch.randn(9, 4)).shape == (9, 2)
    assert len(traced.graph.guards) == 1


def test_without_it_the_file_refuses_another_size(tmp_path):
    traced = trace(subject_of(Flattening()), tmp_path / "net.pt2", form="export")
    assert traced.graph.guards == ()
    with pytest.raises(RuntimeError, match="shape"):
        load(tmp_path / "net.pt2", trusted=True).call(torch.randn(9, 4))


def test_a_size_that_the_model_fixes_is_a_refusal(tmp_path):
    def of_five(x):
        return x.reshape(5, 4).sin()

    traced = trace(subject_of(of_five), tmp_path / "net.pt2", form="export", dynamic={"x": {0: "batch"}})
    assert traced.unit.reason.startswith("torch.export refuses the model: the model fixes the size batch to 5")


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"inputs": {0: "batch"}}, "GC104 --dynamic names no input tensor 'inputs' (did you mean 'input'?): input."),
        ({"input": {2: "batch"}}, "GC104 --dynamic input:2: 'input' is [5, 4], which has no axis 2."),
    ],
    ids=["name", "axis"],
)
def test_a_free_size_that_is_not_there_is_named(tmp_path, dynamic, said):
    with pytest.raises(TargetError) as caught:
        trace(subject_of(two_layers()), tmp_path / "net.pt2", form="export", dynamic=dynamic)
    assert str(caught.value) == said


# ------------------------------------------------------------------ a file and a model that went on


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_a_model_trained_one_step_further_does_not_verify(form, tmp_path):
    model = two_layers()
    (x,) = subject_of(model).args
    trace(subject_of(model), tmp_path / FORMS[form], form=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()

    loaded = load(tmp_path / FORMS[form], trusted=True)
    comparing = Comparing(subject_of(model), Allows(()))
    ensure_fits(loaded, comparing.reference.instance())  # names and shapes are the same
    unit = comparing.captured(loaded, form_named(form))
    assert unit.verdict == "fail"
    assert {"output", "param:0.weight", "param:2.weight"} <= {finding.tensor for finding in unit.findings}


# ------------------------------------------------------------------ branches on data, and progress


class OnlyPositive(nn.Module):
    """Branches on data, and both branches compute the same: no comparison can show that the trace keeps only one."""

    def forward(self, x):
        mask = x > 0
        if mask.any():
            return x.sin()
        return x.sin()


def test_a_trace_that_passes_notes_the_line_where_the_program_branches_on_data(tmp_path):
    unit = trace(subject_of(OnlyPositive()), tmp_path / "net.pt").unit
    (found,) = [each for each in unit.findings if each.code == "GC205"]
    assert (unit.verdict, found.severity) == ("pass", "note")
    assert found.message == "the program branches on data here: trace always takes the branch of the example."
    assert (Path(found.location.file).name, found.location.line) == ("test_trace.py", line_of("if mask.any():"))


@pytest.mark.parametrize("form", ["script", "trace"])
def test_without_a_branch_on_data_or_with_both_sides_captured_there_is_no_note(tmp_path, form):
    model = OnlyPositive() if form == "script" else two_layers()
    unit = trace(subject_of(model), tmp_path / "net.pt", form=form).unit
    assert [each.code for each in unit.findings] == []


def test_progress_says_how_many_steps_there_are(tmp_path):
    said = []
    trace(subject_of(two_layers()), tmp_path / "net.pt", progress=said.append)
    assert said == [
        "step 1 of 3: running eager",
        "step 2 of 3: capturing trace",
        "step 3 of 3: comparing the file with eager",
    ]
