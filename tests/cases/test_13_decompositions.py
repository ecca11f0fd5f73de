"""Case 13: ``ExportedProgram.run_decompositions()`` drops ``detach`` and ``no_grad``; the ONNX exporter calls it.

The exported program itself keeps both. Twin: a model that cuts nothing.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradctl.forms.exported.export import wrap_exported_program
from gradctl.forms.table import form_named
from tests.compared import causes, comparing, different, gradients_of, verdicts

X = torch.tensor([3.0, -2.0])


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach()


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x * 1
        return x * scale


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def decomposed(model: nn.Module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (X,)).run_decompositions()


def unit_of(model: nn.Module, program):
    return comparing(model, X).captured(wrap_exported_program(program), form_named("export"))


@pytest.mark.parametrize(("model", "cause"), [(Detached(), "GC202"), (Cut(), "GC201")], ids=["detach", "no_grad"])
def test_decomposed_the_cut_is_lost(model, cause):
    program = decomposed(model)
    assert gradients_of(model, X)[0].tolist() == [3.0, -2.0]
    assert gradients_of(program.module(), X)[0].tolist() == [6.0, -4.0], "expected on torch 2.13"
    unit = unit_of(model, program)
    assert (different(unit), verdicts(unit)) == ({"input:x": "GC402"}, {"input:x": "wrong"})
    assert causes(unit) == {cause}


@pytest.mark.parametrize("model", [Detached(), Cut()], ids=["detach", "no_grad"])
def test_exported_it_is_kept(model):
    assert unit_of(model, torch.export.export(model, (X,))).verdict == "pass"


def test_a_model_that_cuts_nothing_decomposes_to_the_same():
    assert unit_of(Whole(), decomposed(Whole())).verdict == "pass"
