"""Which parameter of a candidate is which of the reference."""

from __future__ import annotations

import pytest
import torch

from gradctl.comparison.candidates.pairing import copy_values, pair_tensors, parse_map
from gradctl.core.errors import TargetError


def tensors(**shapes):
    return {name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}


def paired(reference, candidate, *renamed, buffers=({}, {})):
    return pair_tensors((reference, buffers[0]), (candidate, buffers[1]), parse_map(renamed))


def test_equal_names_are_partners_in_any_order():
    found = paired(tensors(a=(2,), b=(3,)), tensors(b=(3,), a=(2,)))
    assert found.partners == {"a": "a", "b": "b"}
    assert not found.by_order


def test_parameters_of_other_names_are_paired_by_order_within_a_shape():
    found = paired(tensors(up=(2, 3), down=(3, 2), last=(2, 3)), tensors(x=(3, 2), y=(2, 3), z=(2, 3)))
    assert found.partners == {"x": "down", "y": "up", "z": "last"}
    assert sorted(found.by_order) == ["x", "y", "z"]


def test_a_shape_that_the_models_have_in_other_numbers_is_left_unpaired():
    found = paired(tensors(a=(2,), b=(2,)), tensors(x=(2,)))
    assert found.unpaired_reference == ("a", "b")
    assert found.unpaired_candidate == ("x",)


def test_a_map_goes_before_equal_names():
    found = paired(tensors(a=(2,), b=(2,)), tensors(a=(2,), b=(2,)), "a=b", "b=a")
    assert found.partners == {"b": "a", "a": "b"}


def test_a_star_of_a_map_stands_for_any_text():
    found = paired(
        tensors(enc_0_w=(2,), enc_1_w=(2,), b=(1,)), tensors(layers_0_w=(2,), layers_1_w=(2,), b=(1,)), "enc.*=layers.*"
    )
    assert found.partners == {"layers.0.w": "enc.0.w", "layers.1.w": "enc.1.w", "b": "b"}


def test_buffers_are_paired_by_name_and_shape_only():
    found = paired({}, {}, buffers=(tensors(mean=(2,), cache=(3,), x=(4,)), tensors(mean=(2,), cache=(5,), y=(4,))))
    assert found.partners == {"mean": "mean"}
    assert not found.unpaired_reference


@pytest.mark.parametrize(
    ("renamed", "said"),
    [
        (["c=b"], "--map c=b: the reference has no parameter 'c'"),
        (["a=c"], "--map a=c: the candidate has no parameter 'c'"),
        (["a=d"], r"'d' of the candidate has the shape \[5\], and 'a' of the reference has \[2\]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(renamed, said):
    with pytest.raises(TargetError, match=said):
        paired(tensors(a=(2,)), tensors(b=(2,), d=(5,)), *renamed)


@pytest.mark.parametrize("text", ["a", "=b", "a=", "a.*=b", "a=b.*"])
def test_a_text_that_is_no_map_is_refused(text):
    with pytest.raises(ValueError, match="'"):
        parse_map([text])


def test_tied_parameters_of_a_candidate_cannot_hold_two_values():
    one, two = torch.zeros(2), torch.ones(2)
    shared = torch.zeros(2)
    with pytest.raises(TargetError, match="shares its memory with b"):
        copy_values({"a": one, "b": two}, {"a": shared, "b": shared}, {"a": "a", "b": "b"})
