"""Views, slices and writes to parts of a tensor, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, assert_right_in_onnxruntime, values
from tests.joint.joined import differing

aten = torch.ops.aten


def assert_same(operator, *arguments, **options):
    torch.testing.assert_close(TABLE[operator](*arguments, **options), operator(*arguments, **options))


@pytest.mark.parametrize("offset", [-2, 0, 1])
@pytest.mark.parametrize(("dim1", "dim2"), [(0, 1), (1, 0), (0, -1), (-1, 1)])
def test_a_diagonal_is_written(offset, dim1, dim2):
    matrices = values(4, 5, 6)
    diagonal = torch.diagonal(matrices, offset, dim1, dim2)
    assert_same(aten.diagonal_scatter.default, matrices, values(*diagonal.shape), offset, dim1, dim2)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((3, 4), (8, 2), 1), ((2, 2, 2), (1, 1, 1), 0), ((), (), 2), ((2, 0), (1, 1), 0)],
)
def test_the_last_of_two_writes_to_one_place_stays(size, stride, offset):
    assert_same(aten.as_strided_scatter.default, values(5, 6), values(*size), size, stride, offset)


@pytest.mark.parametrize(("size", "stride", "offset"), [((2, 2), (1, 1), 1), ((3, 4), (8, 2), 0), ((), (), 2)])
def test_a_view_reads_memory(size, stride, offset):
    assert_same(aten.as_strided.default, values(5, 6), size, stride, offset)


def test_memory_beside_a_tensor_is_refused():
    with pytest.raises(NotImplementedError, match="reads other elements of its memory"):
        TABLE[aten.as_strided.default](values(30)[:5], [2], [1], 4)


def test_memory_in_another_order_is_refused():
    with pytest.raises(NotImplementedError, match="not contiguous"):
        TABLE[aten.as_strided_scatter.default](values(5, 6).t(), values(2), [2], [1], 0)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (0, 2), (1, None), (1, 3), (-2, None), (None, -1), (2, 1), (0, 99), (99, None)]
)
def test_a_slice_is_written_between_what_is_around_it(dim, start, end):
    x = values(4, 5, 6)
    length = len(range(*slice(start, end).indices(x.shape[dim])))
    written = values(*(length if axis == dim % 3 else size for axis, size in enumerate(x.shape)))
    assert_same(aten.slice_scatter.default, x, written, dim, start, end)


@pytest.mark.parametrize("accumulate", [False, True])
def test_put_counts_in_the_flattened_tensor(accumulate):
    assert_same(aten.put.default, values(3, 4), torch.tensor([[0, 5], [-1, 2]]), values(2, 2), accumulate)


def test_put_adds_up_where_it_accumulates():
    assert_same(aten.put.default, values(3, 4), torch.tensor([5, 5]), values(2), True)


@pytest.mark.parametrize("alpha", [1, 2.5, -1])
def test_slices_are_added_also_to_a_scalar(alpha):
    assert_same(aten.index_add.default, values(3, 4, 5), 1, torch.tensor([0, 3, 3]), values(3, 3, 5), alpha=alpha)
    assert_same(aten.index_add.default, values(), 0, torch.tensor([0]), values(), alpha=alpha)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "prod", "amax", "amin"])
def test_slices_are_taken_together(reduce, include_self):
    options = {"include_self": include_self}
    index = torch.tensor([0, 3, 3])
    assert_same(aten.index_reduce.default, values(3, 4, 5), 1, index, values(3, 3, 5), reduce, **options)
    assert_same(aten.index_reduce.default, values(), 0, torch.tensor([0]), values(), reduce, **options)


def test_an_index_is_repeated_as_often_as_is_said():
    repeats = torch.tensor([2, 0, 3, 1])
    assert_same(aten.repeat_interleave.Tensor, repeats, output_size=6)
    assert TABLE[aten.repeat_interleave.Tensor](repeats) is NotImplemented


@pytest.mark.parametrize("include_self", [False, True])
def test_a_mean_of_what_is_scattered_divides_by_the_count(include_self):
    index = torch.tensor([[0, 1], [0, 4], [0, 1]])
    assert_same(aten.scatter_reduce.two, values(5, 4), 0, index, values(3, 4), "mean", include_self=include_self)


def test_a_source_that_is_scattered_by_a_mask_gets_its_gradient():
    mask = values(3, 4) > 0
    for sizes in ([3, 4], [20]):
        assert_same(aten.masked_scatter_backward.default, values(3, 4), mask, sizes)


@pytest.mark.parametrize(("dim", "size", "step"), [(0, 3, 1), (0, 2, 2), (1, 3, 2), (-1, 4, 1), (-1, 5, 5)])
def test_windows_that_overlap_add_up(dim, size, step):
    windows = values(7, 6).unfold(dim, size, step)
    assert_same(aten.unfold_backward.default, values(*windows.shape), [7, 6], dim, size, step)


def test_windows_of_one_row_are_those_of_all():
    """istft calls it so."""
    assert_same(aten.unfold_backward.default, values(1, 3, 4), [2, 8], 1, 4, 2)


def test_scalars_are_lists_of_one():
    assert_same(aten.scatter_add.default, values(), 0, torch.tensor(0), values())
    assert_same(aten.scatter.src, values(), 0, torch.tensor([0]), -values(1))
    assert_same(aten.scatter.value, values(), 0, torch.tensor(0), 2.5)
    assert_as_torch({"scatter_add"}, lambda x: x.gather(0, torch.tensor(0)), values())


def test_writes_are_right_in_onnxruntime():
    def writes(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        part = x.clone()
        part[1:, :2] = y[:2, 2:]
        index = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0], [1, 1, 2, 0]])
        mean = x.scatter_reduce(0, index, y, "mean")
        added = x.index_add(0, torch.tensor([0, 2, 2]), y, alpha=-1)
        return (
            mean,
            added,
            part,
            x.sum().max(0).values,
            x.index_reduce(0, torch.tensor([0, 2, 2]), y, "amax"),
            x.repeat_interleave(torch.tensor([2, 0, 3]), 0, output_size=5),
            x.diagonal(1),
            x.unfold(1, 3, 1),
            torch.take(x, torch.tensor([0, 5, 5])),
            x.contiguous().as_strided((2, 2), (1, 1), 1),
            x.masked_scatter(torch.tensor([True, False, True, True]), y),
        )

    assert_right_in_onnxruntime(writes, values(3, 4).float(), values(3, 4).float())


def test_sizes_of_one_go():
    x = values(1, 3, 1, 1)
    for dims in ([0], [0, -1], [1, 2], [3, 0, 2]):
        torch.testing.assert_close(TABLE[aten.squeeze.dims](x, dims), x.squeeze(dims))
    torch.testing.assert_close(TABLE[aten.squeeze.dims](values(), [0]), values())


def test_a_squeeze_is_right_in_onnxruntime():
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :1].squeeze(1), x[:1, :, None].squeeze()

    assert differing(function, values(4, 5).float()) == []


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
        assert_as_torch({"view"}, function, x)


def test_a_gradient_in_channels_last_is_viewed_as_rows() -> None:
    assert differing(Rows(), torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))) == []


def test_a_copied_slice() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_as_torch({"slice_copy"}, lambda x: torch.slice_copy(x, 1, 1, -1, 2), x)
