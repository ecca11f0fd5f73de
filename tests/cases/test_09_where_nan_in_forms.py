"""Case 9 (pytorch 187297, 23395, 52248) in the static forms: eager's NaN of the branch not taken is theirs too.

A form that equals eager passes; eager's own unit has failed (GC407). Twin: a safe argument.
"""

import pytest
import torch
from torch import Tensor

from gradctl.commands.compare import compare
from gradctl.subject.subject import Subject
from tests.compared import gradients_of

X = torch.tensor([4.0, -1.0])
FORMS = ("trace", "export", "aot")


def branch_not_taken(x: Tensor) -> Tensor:
    return torch.where(x > 0, x.sqrt(), x)


def safe_argument(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), x)


@pytest.mark.parametrize(("function", "eager_verdict"), [(branch_not_taken, "fail"), (safe_argument, "pass")])
def test_the_forms_agree_with_eager_nan_or_not(function, eager_verdict):
    assert bool(gradients_of(function, X)[0].isnan().any()) == (eager_verdict == "fail")
    eager, *others = compare(Subject(target="test", model=function, args=(X,)), forms=FORMS, named=True)
    assert eager.verdict == eager_verdict
    assert [unit.verdict for unit in others] == ["pass"] * len(FORMS)
