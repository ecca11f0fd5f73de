"""Shares of a batch, and what the parts of ranks make: oracles are torch.cat and means written out."""

from __future__ import annotations

import pytest
import torch

from gradctl.forms.form import CannotCapture
from gradctl.forms.ranks.sharing import Shares, shares_of
from tests.forms.ranks.models import subject_of

DOUBLE = torch.float64


def parts_of(whole: torch.Tensor, axis: int, sizes: list[int]) -> list[torch.Tensor]:
    return [each.requires_grad_() for each in whole.split(sizes, axis)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_along_any_axis_make_the_whole(axis):
    whole = torch.randn(6, 6, 6, dtype=DOUBLE)
    shares = Shares(2, ((0,), (1,)), (0.5, 0.5))
    assert torch.equal(shares.whole("output", parts_of(whole, axis, [4, 2]), whole.shape), whole)


def test_replicas_of_a_share_count_once():
    whole = torch.randn(4, 3, dtype=DOUBLE)
    first, second = whole.chunk(2)
    shares = Shares(4, ((0, 1), (2, 3)), (0.5, 0.5))
    assert torch.equal(shares.whole("output", [first, first, second, second], whole.shape), whole)


def test_losses_are_averaged_by_the_sizes_of_their_shares_or_summed():
    losses = [torch.tensor(1.0, dtype=DOUBLE), torch.tensor(4.0, dtype=DOUBLE)]
    mean = Shares(2, ((0,), (1,)), (2 / 3, 1 / 3)).whole("output", losses, (), is_output=True)
    total = Shares(2, ((0,), (1,)), (0.5, 0.5), is_sum=True).whole("output", losses, (), is_output=True)
    assert (float(mean), float(total)) == (pytest.approx(2.0), 5.0)


def test_copies_of_a_gradient_are_not_averaged():
    copies = [torch.ones(3), 3 * torch.ones(3)]
    assert torch.equal(Shares(2, ((0,), (1,)), (0.5, 0.5)).whole("param:bias", copies, (3,)), torch.ones(3))


def test_flat_parts_make_a_parameter():
    parts = [torch.arange(5.0), torch.arange(5.0, 12.0)]
    whole = Shares(2, ((0,), (1,)), (0.5, 0.5)).whole("param:weight", parts, (3, 4))
    assert torch.equal(whole, torch.arange(12.0).reshape(3, 4))


def test_parts_that_make_nothing_are_refused_with_their_shapes():
    with pytest.raises(CannotCapture, match=r"\[2, 3\], \[1, 3\] on the ranks, which do not make \[4, 3\]"):
        Shares(2, ((0,), (1,)), (0.5, 0.5)).whole("output", [torch.ones(2, 3), torch.ones(1, 3)], (4, 3))


def test_equal_inputs_are_not_taken_for_replicas():
    subject = subject_of(shard_inputs=lambda inputs, rank, world: tuple(x.chunk(2)[rank % 2] for x in inputs))
    subject.args[0].fill_(1.0)
    shares, _ = shares_of("ranks", 4, subject)
    assert (shares.groups, shares.weights) == (((0, 2), (1, 3)), (0.5, 0.5))
