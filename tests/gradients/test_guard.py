"""Nothing that only explains a finding may end a check: what it raises is a note, and the verdict stands."""

import pytest
import torch
from torch import nn

from gradctl.commands import compare
from gradctl.commands.compare import compare_one
from gradctl.gradients import gradcheck
from gradctl.gradients.guard import explaining, unexplained
from gradctl.subject.subject import Subject
from tests.judged import finding, judge, wrong_tensors
from tests.zoo import plant

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh())


class ModeDependent(Net):
    """Traced, it bakes in the branch of the example."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 0 else 3)


class Overwriting(nn.Module):
    """Writes at an index that occurs twice, where torch's gradient is wrong."""

    def forward(self, x):
        return torch.zeros(4, dtype=x.dtype).scatter(0, torch.tensor([0, 2, 2]), x.sin())


def broken(*args, **kwargs):
    raise KeyError("ours")


@pytest.mark.parametrize("explanation", ["worst_elements"])
def test_a_wrong_gradient_is_named_though_its_explanation_raises(monkeypatch, explanation):
    monkeypatch.setattr(gradcheck, explanation, broken)
    unit = judge(plant(Net(), "fc1.weight", "scale 1.1"), X)
    assert (unit.verdict, wrong_tensors(unit)) == ("fail", ["param:fc1.weight"])
    note = finding(unit, "GC419")
    assert note.severity == "note"
    assert note.message.endswith("could not be explained: KeyError: 'ours'.")
    assert 'raise KeyError("ours")' in unit.details


def test_a_wrong_call_fails_though_the_search_for_it_raises(monkeypatch):
    monkeypatch.setattr(gradcheck, "locate_wrong_backwards", broken)
    unit = judge(Overwriting(), torch.randn(3))
    assert wrong_tensors(unit) == ["input:x"]
    note = "the call whose backward is wrong could not be explained: KeyError: 'ours'."
    assert finding(unit, "GC419").message == note


@pytest.mark.parametrize("explanation", ["cut_notes", "hook_notes", "cast_note"])
def test_a_right_model_passes_though_a_note_raises(monkeypatch, explanation):
    monkeypatch.setattr(gradcheck, explanation, broken)
    unit = judge(Net(), X)
    assert unit.verdict == "pass"
    assert finding(unit, "GC419").message.endswith("KeyError: 'ours'.")


@pytest.mark.parametrize("explanation", ["locate_findings", "explain_findings"])
def test_a_wrong_form_is_named_though_its_explanation_raises(monkeypatch, explanation):
    monkeypatch.setattr(compare, explanation, broken)
    unit = compare_one(Subject(target="test", model=ModeDependent(), args=(X,), kwargs={}), "trace")
    assert unit.verdict == "fail"
    assert finding(unit, "GC419").message.endswith("could not be explained: KeyError: 'ours'.")


def test_without_an_exception_there_is_no_note():
    unit = judge(plant(Net(), "fc1.weight", "scale 1.1"), X)
    assert "GC419" not in {each.code for each in unit.findings}
    assert unit.details is None


def test_one_message_is_one_note():
    with unexplained() as failures:
        for _ in range(2):
            with explaining("this"):
                raise ValueError("no")
    assert [note.message for note in failures.notes()] == ["this could not be explained: ValueError: no."]


def test_out_of_memory_ends_the_check():
    with pytest.raises(MemoryError), unexplained(), explaining("this"):
        raise MemoryError


def test_outside_a_check_an_exception_is_raised():
    with pytest.raises(ValueError, match="no"), explaining("this"):
        raise ValueError("no")
