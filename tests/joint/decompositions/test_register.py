"""The table of all families: each operator has one decomposition, and none hides torch's own."""

from __future__ import annotations

import pytest
import torch
from torch._decomp import core_aten_decompositions

from gradctl.joint.decompositions import TABLE
from gradctl.joint.decompositions.complex_numbers import COMPLEX
from gradctl.joint.decompositions.register import REAL, decomposes


def test_an_operator_has_one_decomposition_beside_that_of_complex_numbers():
    with pytest.raises(ValueError, match="aten.lgamma.default has two decompositions"):
        decomposes(torch.ops.aten.lgamma.default)(torch.lgamma)
    assert {*REAL, *COMPLEX} == set(TABLE)


def test_what_torch_decomposes_is_not_left_whole_for_the_sake_of_complex_numbers():
    assert not COMPLEX.keys() & core_aten_decompositions().keys() - REAL.keys()
