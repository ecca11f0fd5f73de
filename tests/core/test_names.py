"""The names that the report and the options share."""

from __future__ import annotations

import pytest
import torch

from gradctl.core.names import DTYPES, SEVERITIES, input_name, output_name, parameter_name


def test_names_say_what_they_name():
    assert parameter_name("fc1.weight") == "param:fc1.weight"
    assert input_name("batch.mask") == "input:batch.mask"
    assert (output_name(""), output_name("logits")) == ("output", "output.logits")


def test_severities_are_listed_worst_first():
    assert SEVERITIES == ("error", "warning", "note")


@pytest.mark.parametrize(("short", "name"), DTYPES.items())
def test_every_short_dtype_is_one_of_torch(short, name):
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    # The digits of the short name are the bits of an element (c64: two halves of 32).
    assert short == "bool" or int("".join(filter(str.isdigit, short))) == 8 * dtype.itemsize
