"""A view is taken of a tensor of any layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradctl.joint.decompositions.layout import TABLE
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing


class Rows(nn.Module):
    """A depthwise convolution of an image whose channels come last, viewed as rows: ConvNeXt's block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).to(memory_format=torch.channels_last)
        return self.depthwise(hidden).permute(0, 2, 3, 1).contiguous().view(-1, 6).tanh()


def test_a_view_of_rows_that_are_not_contiguous() -> None:
    x = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (lambda x: x[:, :, ::2].view(4, 3, 3), lambda x: x.permute(1, 0, 2).view(3, 4, 2, 3)):
        assert_as_torch(TABLE, {"view"}, function, x)


def test_a_gradient_in_channels_last_is_viewed_as_rows() -> None:
    assert differing(Rows(), torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))) == []


def test_a_copied_slice() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_as_torch(TABLE, {"slice_copy"}, lambda x: torch.slice_copy(x, 1, 1, -1, 2), x)
