"""Reductions, cumulative operators and order statistics, against torch's own kernels and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from gradctl.joint.decompositions import TABLE
from tests.joint.decompositions.substituted import assert_as_torch, assert_right_in_onnxruntime, values
from tests.joint.joined import by_onnxruntime, differing, joint_graph


@pytest.mark.parametrize(("dim", "keepdim"), list(itertools.product((0, -2, 1, (0, 1)), (False, True))))
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (0, 3)])
def test_sums_of_a_matrix_by_any_axis(dim: int | tuple[int, ...], keepdim: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    used = {"sum"} if dim in {0, -2} else set()
    assert_as_torch(used, lambda x: x.sum(dim, keepdim), x)


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 50, 50), None), ((90, 2, 70), (0, -1)), ((2, 6000), 1), ((6000,), 0)],
)
@pytest.mark.parametrize("keepdim", [False, True])
def test_sum_of_many_terms_is_a_sum_of_sums(
    name: str, shape: tuple[int, ...], dim: int | tuple[int, ...] | None, keepdim: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reduce = getattr(torch, name)
    assert_as_torch({name}, (lambda x: reduce(x, dim, keepdim)) if dim is not None else reduce, x)


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(8, 128, 256), (512, 512), (1000000,)])
def test_sum_of_many_terms_is_as_exact_as_that_of_torch(name: str, shape: tuple[int, ...]) -> None:
    class Reduced(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return getattr(x, name)()

    # In one operator, onnxruntime 1.32 is off by 1e-5 and more: each partial sum of equal terms is rounded to one side.
    x = torch.full(shape, 0.7337).requires_grad_()
    found = by_onnxruntime(joint_graph(Reduced(), x), {"input.x": x, "grad_output": torch.ones(())})
    assert found["output"].item() == pytest.approx(getattr(x.double(), name)().item(), rel=5e-7)


def test_infinite_entries_stay_in_their_column() -> None:
    x = torch.tensor([[float("inf"), 1.0, float("nan")], [1.0, 2.0, 3.0]], dtype=torch.float64)
    found = TABLE[torch.ops.aten.sum.dim_IntList](x, [0])
    torch.testing.assert_close(found, torch.tensor([float("inf"), 3.0, float("nan")]).double(), equal_nan=True)


def test_the_bias_of_a_linear_layer_has_the_gradient_of_autograd() -> None:
    assert differing(nn.Linear(4, 3), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))) == []


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("masked", ["nothing", "entries", "row and column", "everything"])
def test_softmax_of_rows_with_masked_positions(dim: int, masked: str) -> None:
    x = 10 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = {"nothing": [], "entries": [(0, 1), (2, 2)], "everything": [...]}.get(masked, [(1,), (slice(None), 2)])
    for place in hidden:
        x[place] = -torch.inf
    assert_as_torch({"_safe_softmax"}, lambda x: torch.ops.aten._safe_softmax(x, dim), x)


class Masked(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_attention_of_a_row_that_sees_nothing() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    assert differing(Masked(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), mask) == []


aten = torch.ops.aten


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_exponents_do_not_overflow(keepdim, dims):
    x = values(3, 4) * 1000
    x[0] = -torch.inf
    x[1, 1] = torch.inf
    found = TABLE[aten.logsumexp.default](x, dims, keepdim)
    torch.testing.assert_close(found, torch.logsumexp(x, dims, keepdim))
    torch.testing.assert_close(TABLE[aten.logsumexp.default](values(), [0], keepdim), values())


@pytest.mark.parametrize("name", ["amax", "amin"])
@pytest.mark.parametrize("keepdim", [False, True])
def test_an_extreme_is_that_of_all_axes_where_none_is_named(name, keepdim):
    operator = getattr(aten, name).default
    for x in (values(3, 4), values()):
        torch.testing.assert_close(TABLE[operator](x, [], keepdim), operator(x, [], keepdim))


def test_booleans_have_a_maximum():
    flags = torch.tensor([[False, True, True], [False, False, False]])
    torch.testing.assert_close(TABLE[aten.max.dim](flags, 1), tuple(flags.max(1)))


SCANS = {"cumprod": torch.cumprod, "cummax": torch.cummax, "cummin": torch.cummin, "logcumsumexp": torch.logcumsumexp}


CUMULATIVE_AXES = [((7,), 0), ((1,), 0), ((3, 8), 0), ((3, 8), -1), ((2, 5, 4), 1), ((), 0)]


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize(("shape", "dim"), CUMULATIVE_AXES)
@pytest.mark.parametrize("ties", [False, True])
def test_a_scan_takes_in_all_elements_up_to_each(name, shape, dim, ties):
    x = values(*shape).round() if ties else values(*shape)
    found = TABLE[getattr(torch.ops.aten, name).default](x, dim)
    torch.testing.assert_close(found, tuple(SCANS[name](x, dim)) if isinstance(found, tuple) else SCANS[name](x, dim))


@pytest.mark.parametrize("name", SCANS)
def test_nan_and_infinities_go_where_torch_lets_them_go(name):
    x = torch.tensor([1.0, -torch.inf, 2.0, torch.inf, torch.inf, 0.5, torch.nan, 3.0, torch.nan, -torch.inf])
    for row in (x, x[:6], x[1:3], x[5:]):
        found, expected = TABLE[getattr(torch.ops.aten, name).default](row, 0), SCANS[name](row, 0)
        found, expected = (tuple(each) if isinstance(each, tuple) else (each,) for each in (found, expected))
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", SCANS)
def test_the_gradient_of_a_scan_is_that_of_torch(name):
    assert_as_torch(
        {name}, lambda x: tuple(SCANS[name](x, 1))[:1] if "cumm" in name else SCANS[name](x, 1), values(2, 5, 3)
    )


def test_integers_and_a_dtype():
    x = torch.tensor([3, 1, 4, 1, 5])
    for name in ("cummax", "cummin"):
        torch.testing.assert_close(TABLE[getattr(torch.ops.aten, name).default](x, 0), tuple(SCANS[name](x, 0)))
    found = TABLE[torch.ops.aten.cumprod.default](x, 0, dtype=torch.float64)
    torch.testing.assert_close(found, torch.cumprod(x, 0, dtype=torch.float64))


def test_scans_are_right_in_onnxruntime():
    def scans(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.cumprod(1), x.cummax(1).values, x.cummin(0).values, x.logcumsumexp(1)

    assert_right_in_onnxruntime(scans, values(3, 6).float())


def with_nan() -> Tensor:
    x = values(4, 5)
    x[1, 2] = x[3, 0] = x[3, 4] = torch.nan
    x[2] = torch.nan
    return x


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_medians_and_kth_values_are_those_of_torch(dim, keepdim):
    for x in (values(4, 5), values(3, 6, 2)):
        for name in ("median", "nanmedian"):
            used = {name}
            operator = getattr(torch, name)
            assert_as_torch(used, lambda x: tuple(operator(x, dim, keepdim)), x)
        for k in (1, 2):
            assert_as_torch({"kthvalue"}, lambda x: tuple(x.kthvalue(k, dim, keepdim)), x)


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_nan_is_last_or_not_counted(name):
    operator = getattr(aten, name)
    for dim in (0, 1):
        found, expected = TABLE[operator.dim](with_nan(), dim, False), operator.dim(with_nan(), dim, False)
        torch.testing.assert_close(found[0], expected[0], equal_nan=True)
        # Where all is NaN torch takes any.
        known = ~with_nan().isnan().all(dim)
        torch.testing.assert_close(found[1][known], expected[1][known])
    torch.testing.assert_close(TABLE[operator.default](with_nan()), operator.default(with_nan()), equal_nan=True)


@pytest.mark.parametrize("name", ["median", "nanmedian"])
def test_the_median_of_all_elements_shares_its_gradient_among_equals(name):
    for x in (values(3, 5), values(3, 4).round(), values()):
        assert_as_torch({name}, getattr(torch, name), x)


def test_integers_and_scalars_are_ordered():
    x = torch.tensor([[3, 1, 2], [5, 4, 9]])
    for name in ("median", "nanmedian"):
        torch.testing.assert_close(TABLE[getattr(aten, name).dim](x, 1), tuple(getattr(torch, name)(x, 1)))
        torch.testing.assert_close(
            TABLE[getattr(aten, name).dim](values(), 0), tuple(getattr(torch, name)(values(), 0))
        )
    torch.testing.assert_close(TABLE[aten.kthvalue.default](values(), 1), tuple(values().kthvalue(1)))
    torch.testing.assert_close(TABLE[aten.topk.default](values(), 1), tuple(values().topk(1)))


def test_orders_are_right_in_onnxruntime():
    def orders(x: Tensor) -> tuple[Tensor, ...]:
        ties = (x * 2).round()
        return (
            ties.sort(stable=True, dim=1, descending=True).indices,
            x.sort(stable=True, dim=0).values,
            x.median(1).values,
            x.median(),
            x.nanmedian(0).values,
            x.kthvalue(2, 1).values,
            x.sum().topk(1).values,
        )

    assert_right_in_onnxruntime(orders, values(4, 6).float())
