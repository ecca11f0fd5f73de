"""Functions of single elements and some products, against torch's own kernels and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradctl.commands.compare import Comparing
from gradctl.core.allows import Allows
from gradctl.joint.decompositions.special import TABLE
from gradctl.subject.subject import Subject
from tests.joint.decompositions.substituted import assert_as_torch
from tests.joint.joined import differing

aten = torch.ops.aten
LINE = torch.cat(
    [
        torch.linspace(-26, 30, 500, dtype=torch.float64),
        torch.tensor([0.0, 1e-12, -1e-12, 1e-300, 1e8, -0.999, -1.0, torch.inf, torch.nan], dtype=torch.float64),
    ]
)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "at"),
    [("special_erfcx", LINE), ("special_log_ndtr", 3 * LINE), ("log1p", LINE), ("expm1", LINE), ("expm1", -LINE)],
)
def test_small_and_large_arguments_keep_their_digits(name, at):
    operator = getattr(aten, name).default
    # A power of e to the hundreds has some hundred times the rounding of its argument.
    torch.testing.assert_close(TABLE[operator](at), operator(at), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("erfinv", torch.linspace(-1, 1, 401, dtype=torch.float64)),
        ("erfinv", torch.tensor([1e-300, 1 - 1e-12, -1 + 1e-16, torch.nan, 1.5, -2.0], dtype=torch.float64)),
        ("special_ndtri", torch.linspace(0, 1, 401, dtype=torch.float64)),
        ("special_ndtri", torch.tensor([1e-300, 1e-13, 1e-7, torch.nan, 1.5, -1.0], dtype=torch.float64)),
    ],
)
def test_quantiles_keep_their_digits(name, at):
    operator = getattr(aten, name).default
    # torch's own erfinv is off by 1e-12 where 1 - x is.
    torch.testing.assert_close(TABLE[operator](at), operator(at), rtol=1e-11, atol=1e-15, equal_nan=True)


def test_the_hypotenuse_of_large_and_of_small_legs_is_finite():
    legs = torch.tensor([0.0, 3.0, -4.0, 1e200, 1e-200, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    x, y = torch.meshgrid(legs, legs, indexing="ij")
    torch.testing.assert_close(TABLE[aten.hypot.default](x, y), torch.hypot(x, y), equal_nan=True)
    assert_as_torch(TABLE, {"hypot"}, torch.hypot, values(3, 4), values(4))


def test_a_sign_is_copied_from_zero_too():
    signs = torch.tensor([1.0, -1.0, 0.0, -0.0, torch.inf, -torch.inf])
    for x in (values(6), torch.arange(-3, 3)):
        torch.testing.assert_close(TABLE[aten.copysign.Tensor](x, signs), torch.copysign(x, signs))
        for sign in (2.0, -0.0):
            torch.testing.assert_close(TABLE[aten.copysign.Scalar](x, sign), torch.copysign(x, sign))
    torch.testing.assert_close(TABLE[aten.signbit.default](signs), signs.signbit())
    torch.testing.assert_close(TABLE[aten.signbit.default](torch.arange(-2, 2)), torch.arange(-2, 2).signbit())


@pytest.mark.parametrize("name", ["special_erfcx", "special_log_ndtr", "log1p", "expm1", "erfinv", "special_ndtri"])
def test_integers_become_floats(name):
    operator = getattr(aten, name).default
    torch.testing.assert_close(
        TABLE[operator](torch.tensor([0, 1, 5])), operator(torch.tensor([0, 1, 5])), equal_nan=True
    )


@pytest.mark.parametrize("shrink", [F.softshrink, F.hardshrink])
@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_nothing_goes_through_between_the_bounds(shrink, bound):
    at = torch.cat([values(20), torch.tensor([bound, -bound, 0.0])])
    used = {f"{shrink.__name__}_backward"}
    assert_as_torch(TABLE, used, lambda x: shrink(x, bound), at)


@pytest.mark.parametrize("dim", [0, 2])
def test_a_normed_weight_has_the_gradients_of_torch(dim):
    direction, length = values(3, 4, 5), values(3, 1, 1) if dim == 0 else values(1, 1, 5)
    used = {"_weight_norm_interface_backward"}
    assert_as_torch(TABLE, used, lambda v, g: aten._weight_norm_interface(v, g, dim)[0], direction, length)


def test_a_bilinear_form_has_the_gradients_of_torch():
    used = {"_trilinear"}
    assert_as_torch(TABLE, used, F.bilinear, values(5, 3), values(5, 4), values(6, 3, 4), values(6))


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


@pytest.mark.parametrize("choose", [torch.fmax, torch.fmin])
def test_a_number_is_chosen_before_what_is_none(choose):
    first = torch.tensor([1.0, torch.nan, 2.0, torch.nan, -torch.inf], dtype=torch.float64)
    second = torch.tensor([2.0, 1.0, torch.nan, torch.nan, 3.0], dtype=torch.float64)
    operator = getattr(aten, choose.__name__).default
    torch.testing.assert_close(TABLE[operator](first, second), choose(first, second), equal_nan=True)


def test_sizes_of_one_go():
    x = values(1, 3, 1, 1)
    for dims in ([0], [0, -1], [1, 2], [3, 0, 2]):
        torch.testing.assert_close(TABLE[aten.squeeze.dims](x, dims), x.squeeze(dims))
    torch.testing.assert_close(TABLE[aten.squeeze.dims](values(), [0]), values())


def test_integers_are_clamped_and_booleans_have_a_maximum():
    x = torch.arange(-3, 4)
    for bounds in ((0, None), (None, 1), (-1, 1)):
        torch.testing.assert_close(TABLE[aten.clamp.default](x, *bounds), x.clamp(*bounds))
    torch.testing.assert_close(TABLE[aten.relu.default](x), x.relu())
    flags = torch.tensor([[False, True, True], [False, False, False]])
    torch.testing.assert_close(TABLE[aten.max.dim](flags, 1), tuple(flags.max(1)))


def test_the_functions_are_right_in_onnxruntime():
    def functions(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        special = (
            torch.special.erfcx(x),
            torch.special.log_ndtr(x * 8),
            torch.log1p(x.abs() * 1e-6),
            torch.expm1(x / 1e5),
            torch.erfinv(x.tanh()),
            torch.special.ndtri(x.sigmoid()),
            torch.hypot(x, x.flip(1)),
            torch.copysign(x, -x),
        )
        return *special, torch.linalg.vector_norm(x, keepdim=True), F.softshrink(x), x.sum().logsumexp(0), x.prod(1)

    unit = Comparing(Subject(target="functions", model=functions, args=(values(4, 5).float(),)), Allows(())).form(
        "onnx-joint", named=True
    )
    assert (unit.verdict, unit.reason) == ("pass", None), (unit.details, unit.findings)


def test_a_normed_layer_is_right_in_onnxruntime():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    assert differing(layer, values(2, 4).float()) == []


def test_a_squeeze_is_right_in_onnxruntime():
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :1].squeeze(1), x[:1, :, None].squeeze()

    assert differing(function, values(4, 5).float()) == []


@pytest.mark.parametrize("bounds", [(0, 0.9), (-0.5, 1)])
def test_bounds_of_two_types_are_right_in_onnxruntime(bounds: tuple[float, float]):
    assert differing(lambda x: x.clamp(*bounds), values(4, 5).float()) == []
